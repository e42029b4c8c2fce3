"""Where files go and how they are written: whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from importlib import resources
from pathlib import Path
from typing import TypeVar

import platformdirs
from pydantic import BaseModel

from peftbench.errors import DiskFullError, OutputError

ResourceT = TypeVar("ResourceT", bound=BaseModel)

CACHE_DIR_ENV = "PEFTBENCH_CACHE"
UNWRITABLE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})
"""Numbers of the system's errors that speak of the place written to, not of what was read."""


def cache_dir() -> Path:
    """Folder for what can be made again: ``$PEFTBENCH_CACHE``, else the platform's cache folder for peftbench."""
    return Path(os.environ.get(CACHE_DIR_ENV) or platformdirs.user_cache_dir("peftbench"))


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) so that ``path`` holds either its old content or all of the new, after a crash too.

    Raises:
        DiskFullError: no space, or the quota is used up; nothing is left behind.
        OutputError: the folder cannot be made or written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
        ) as file:
            temporary = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_get_umask())
        temporary.replace(path)
    except BaseException as error:  # an interrupt and a text that has no encoding must leave nothing behind either
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def write_error(path: Path, error: OSError) -> OutputError:
    """The exception that tells a user why ``path`` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"the disk is full: {path} could not be written ({error.strerror})")
    return OutputError(f"cannot write {path}: {error.strerror or error}")


def as_os_error(error: Exception) -> OSError:
    """What a failed write says to the system; safetensors has an exception of its own, with the number in its text."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number.group(1)), os.strerror(int(number.group(1)))) if number else OSError(None, str(error))


def _get_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_json_resources(package: str, kind: type[ResourceT]) -> dict[str, ResourceT]:
    """Every file of ``package``, by its name without the ending, in order."""
    files = (path for path in resources.files(package).iterdir() if path.name.endswith(".json"))
    found = {path.name.removesuffix(".json"): kind.model_validate_json(path.read_bytes()) for path in files}
    return dict(sorted(found.items()))
