"""Upload an exported folder to the Hugging Face Hub.

The token is the one that huggingface_hub finds: ``HF_TOKEN``, or the login of ``hf auth login``. No message has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from peftbench.errors import HubUnreachableError, OutOfRangeError, UploadError

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

_COMMIT_MESSAGE = "Upload a model trained with peftbench"
_INITIAL_FILES = frozenset({".gitattributes", "README.md"})
"""Files that the Hub may put into a new repository."""
_LOGIN_HINT = "log in with hf auth login, or set HF_TOKEN to a token with write access"


def check_repository_name(repository: str) -> None:
    """Check that ``repository`` is a name like USER/NAME.

    Raises:
        OutOfRangeError: it is not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
        if repository.count("/") == 1:
            return
    except HFValidationError:
        pass
    raise OutOfRangeError(
        f"--push={repository} is not the name of a repository",
        "write USER/NAME with letters, digits and . _ -",
    )


def check_login() -> None:
    """Check before any work that there is a token, and that requests are allowed.

    Raises:
        UploadError: there is no token.
        HubUnreachableError: offline mode is on.
    """
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise HubUnreachableError("--push needs the Hub, and HF_HUB_OFFLINE is set", "unset it, or omit --push")
    if get_token() is None:
        raise UploadError("--push needs a token of the Hub, and none was found", _LOGIN_HINT)


def push_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Create the repository and upload ``folder``; return its URL.

    A repository that exists is used if it has no files yet, e.g. after an upload that the network ended.

    Raises:
        UploadError: the Hub refuses the token, the name or the files.
        HubUnreachableError: it does not answer.
    """
    from huggingface_hub import HfApi, constants

    api = HfApi()
    with _translate_errors(repository, folder):
        _create_repository(api, repository, private=private)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=_COMMIT_MESSAGE)
    return f"{constants.ENDPOINT}/{repository}"


def _create_repository(api: HfApi, repository: str, *, private: bool) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(repository, private=private)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        info = api.model_info(repository)
        names = {sibling.rfilename for sibling in info.siblings or ()}
        if names - _INITIAL_FILES:
            raise UploadError(f"the repository {repository} exists and has files", "give another name") from error
        if bool(info.private) != private:
            state, option = ("private", "--private") if info.private else ("public", "--public")
            raise UploadError(
                f"the repository {repository} exists and is {state}", f"add {option}, or give another name"
            ) from error


@contextmanager
def _translate_errors(repository: str, folder: Path) -> Iterator[None]:
    """Replace errors of huggingface_hub, whose text may have parts of a request, by one sentence.

    Raises:
        UploadError: the Hub refused the upload.
        HubUnreachableError: it does not answer.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    http_error: type[Exception] = HfHubHTTPError.__bases__[0]  # of httpx, whose name differs between versions

    try:
        yield
    except HfHubHTTPError as error:
        _raise_refusal(error, repository, folder)
    except (http_error, OfflineModeIsEnabled, OSError) as error:
        raise HubUnreachableError(
            f"the Hub did not answer while {repository} was uploaded", _suggest_retry(repository, folder)
        ) from error
    except (RuntimeError, ValueError) as error:  # the storage of large files, or an answer that is not the Hub's
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            _raise_refusal(cause, repository, folder)
        raise UploadError(
            f"the upload of {repository} failed in the storage of large files", _suggest_retry(repository, folder)
        ) from error


def _raise_refusal(error: HfHubHTTPError, repository: str, folder: Path) -> NoReturn:
    """Raise the refusal as a sentence with the status code.

    Raises:
        UploadError: always.
    """
    status = error.response.status_code
    if status == 401:
        raise UploadError(f"the Hub does not accept the token (401) for {repository}", _LOGIN_HINT) from error
    if status == 403:
        user = repository.partition("/")[0]
        raise UploadError(
            f"the token may not write to {repository} (403)",
            f"use a token with write access to {user}, or give the name of a repository of your own",
        ) from error
    raise UploadError(
        f"the Hub refused the upload of {repository} (status {status})", _suggest_retry(repository, folder)
    ) from error


def _suggest_retry(repository: str, folder: Path) -> str:
    return f"the exported folder is complete; upload it later with hf upload {repository} {folder}"
