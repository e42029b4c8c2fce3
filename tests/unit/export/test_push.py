"""An export is uploaded to a server on this machine; each refusal is one sentence, and the token is in no output."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants

from peftbench.cli.app import app
from peftbench.errors import HubUnreachableError, OutOfRangeError, UploadError
from peftbench.export.push import check_login, check_repository_name, push_folder
from tests.helpers.hub_server import HubServer, serve_hub

TOKEN = "hf_" + "SeCrEtToKeN" * 3
USER = "jane"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """Return a server that accepts ``TOKEN``."""
    with serve_hub(TOKEN, USER) as server:
        yield server


@pytest.fixture
def logged_in(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """Return the server, which this process uses as the Hub with an accepted token."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a small file and a file that is stored apart, as weights are."""
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: unknown\n---\n# Model\n", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return folder


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return the content of every file by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_folder_is_uploaded_completely(logged_in: HubServer, folder: Path) -> None:
    """Small and large files arrive as they are, in a private repository unless asked otherwise."""
    assert push_folder(folder, "jane/model", private=True) == f"{logged_in.url}/jane/model"
    files = dict(logged_in.repositories["jane/model"])
    files.pop(".gitattributes")
    assert files == read_folder(folder)
    assert logged_in.private["jane/model"]
    push_folder(folder, "jane/open", private=False)
    assert not logged_in.private["jane/open"]


def test_repository_of_an_interrupted_upload_is_used_again(logged_in: HubServer, folder: Path) -> None:
    """A repository without files was created by an upload that failed later."""
    logged_in.failing_path = "/commit/"
    with pytest.raises(UploadError, match=r"refused the upload of jane/model \(status 500\); the exported folder is"):
        push_folder(folder, "jane/model", private=True)
    logged_in.failing_path = None
    with pytest.raises(UploadError, match="exists and is private; add --private"):
        push_folder(folder, "jane/model", private=False)
    push_folder(folder, "jane/model", private=True)
    assert set(read_folder(folder)) <= set(logged_in.repositories["jane/model"])


def test_repository_with_files_is_not_changed(logged_in: HubServer, folder: Path) -> None:
    """A name that exists is refused."""
    logged_in.repositories["jane/model"] = {"config.json": b"{}"}
    logged_in.private["jane/model"] = True
    with pytest.raises(UploadError, match="the repository jane/model exists and has files; give another name"):
        push_folder(folder, "jane/model", private=True)
    assert logged_in.repositories["jane/model"] == {"config.json": b"{}"}


@dataclass(frozen=True)
class Refusal:
    """An upload that the server refuses, and the sentence that explains it."""

    repository: str
    token: str
    failing_path: str | None
    message: str


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(
            "jane/model",
            "hf_wrong",
            None,
            r"does not accept the token \(401\) for jane/model; log in with hf auth login",
        ),
        Refusal(
            "joe/model",
            TOKEN,
            None,
            r"the token may not write to joe/model \(403\); use a token with write access to joe",
        ),
        Refusal("jane/model", TOKEN, "/api/repos/create", r"refused the upload of jane/model \(status 500\)"),
        Refusal("jane/model", TOKEN, "/preupload/", r"refused the upload of jane/model \(status 500\)"),
        Refusal("jane/model", TOKEN, "/storage/", r"refused the upload of jane/model \(status 500\)"),
    ],
)
def test_refusal_is_one_sentence_without_the_token(
    refusal: Refusal,
    logged_in: HubServer,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The server's answers repeat the token, which neither the error nor any output does."""
    monkeypatch.setenv("HF_TOKEN", refusal.token)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    logged_in.failing_path = refusal.failing_path
    with pytest.raises(UploadError, match=refusal.message) as raised:
        push_folder(folder, refusal.repository, private=True)
    output = capfd.readouterr()
    assert refusal.token not in str(raised.value) + output.out + output.err
    assert "\n" not in str(raised.value)


def test_hub_that_does_not_answer(folder: Path, logged_in: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server listens at the address."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with pytest.raises(HubUnreachableError, match="did not answer while jane/model was uploaded; the exported folder"):
        push_folder(folder, "jane/model", private=True)


@pytest.mark.parametrize("name", ["model", "a/b/c", "jane/", "jane/a b", "jane/..", ""])
def test_name_that_no_repository_can_have(name: str) -> None:
    """The name is refused before any work."""
    with pytest.raises(OutOfRangeError, match="is not the name of a repository; write USER/NAME"):
        check_repository_name(name)


def test_missing_token_and_offline_mode_are_found_before_any_work(
    logged_in: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request is sent."""
    check_login()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UploadError, match="none was found; log in with hf auth login, or set HF_TOKEN"):
        check_login()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match="HF_HUB_OFFLINE is set"):
        check_login()
    assert logged_in.requests == []


def call(arguments: list[str], directory: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the command line in another process."""
    return subprocess.run(
        [sys.executable, "-m", "peftbench", *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


PUSH_MERGED = ("--merge", "--dtype", "bf16", "--push", "jane/lora")


def check_merged_push(hub: HubServer, run: Path, directory: Path, stdout: str, stderr: str) -> None:
    """Check that the merged model arrived on the server, and that the token is in no output and no file."""
    assert stdout.splitlines() == ["exported: exports/lora-merged", f"pushed: {hub.url}/jane/lora"]
    assert "checked: on 5 texts the logits in bf16 differ" in stderr
    exported = directory / "exports" / "lora-merged"
    files = dict(hub.repositories["jane/lora"])
    files.pop(".gitattributes")
    assert files == read_folder(exported)
    assert b'model="jane/lora"' in files["README.md"]
    written = [path.read_bytes() for root in (directory, run) for path in root.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in [*written, *files.values()])
    assert TOKEN not in stdout + stderr


def test_command_merges_and_pushes(
    logged_in: HubServer,
    finished_run: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The merged model arrives on the server; the token is in no output and no file."""
    monkeypatch.chdir(tmp_path)
    run = finished_run("lora")
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        app(["export", str(run), *PUSH_MERGED])
    output = capfd.readouterr()
    assert ended.value.code == 0, output.err
    check_merged_push(logged_in, run, tmp_path, output.out, output.err)


@pytest.mark.slow
def test_process_merges_and_pushes(
    hub: HubServer, finished_run: Callable[[str], Path], caches: dict[str, str], tmp_path: Path
) -> None:
    """The same for a process that finds the server by HF_ENDPOINT and logs everything."""
    environment = caches | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "HF_HUB_VERBOSITY": "debug",
    }
    run = finished_run("lora")
    result = call(["export", str(run), *PUSH_MERGED], tmp_path, environment)
    assert result.returncode == 0, result.stderr
    check_merged_push(hub, run, tmp_path, result.stdout, result.stderr)


def test_refused_upload_ends_the_command_with_its_exit_code(
    logged_in: HubServer,
    finished_run: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The error is one line on standard error, and the exported folder stays."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        app(["export", str(finished_run("lora")), "--push", "joe/lora"])
    assert raised.value.code == UploadError.exit_code
    output = capfd.readouterr()
    assert output.err.splitlines()[-1].startswith("error: the token may not write to joe/lora (403); use a token with")
    assert output.out.splitlines() == ["exported: exports/lora"]
    assert TOKEN not in output.out + output.err
    assert (tmp_path / "exports" / "lora" / "README.md").exists()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "error"),
    [
        (["--private"], 13, "--private has no effect without --push"),
        (["--public"], 13, "--public has no effect without --push"),
        (["--push", "model"], 13, "--push=model is not the name of a repository"),
        (["--push", "jane/model"], 25, "HF_HUB_OFFLINE is set"),
    ],
)
def test_options_are_refused_before_the_run_is_read(
    arguments: list[str], exit_code: int, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run does not exist, and is not looked at."""
    with pytest.raises(SystemExit) as raised:
        app(["export", str(tmp_path / "missing"), *arguments])
    assert raised.value.code == exit_code
    assert error in capsys.readouterr().err
    assert os.listdir(tmp_path) == []  # noqa: PTH208
