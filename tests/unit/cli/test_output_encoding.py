"""Terminals and pipes that cannot encode a character: it is replaced, in every command."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peftbench import train
from peftbench.cli.app import app
from peftbench.common.output_encoding import replace_unencodable_characters
from peftbench.common.text import make_encodable
from peftbench.errors import MissingFileError, RecordError
from peftbench.report.writer import PAGE_FILE, RESULTS_FILE
from peftbench.slurm import folder as slurm_folder
from tests.helpers.project import write_project
from tests.unit.report.suites import build_run, write_suite

Streams = tuple[io.BytesIO, io.BytesIO]
NAME = "été–日本"
"""Not in ASCII; the second half is not in Latin-1 either."""

COMMANDS: list[tuple[list[str], int]] = [
    (["status", "A"], 0),
    (["report", "A"], 0),
    (["report", "A", "--group-by", "train.seed"], 0),
    (["report", f"no{NAME}"], RecordError.exit_code),
    (["compare", "A", "B"], 61),
    (["show", "recipe.yaml", "task.kind=summarization", f"task.separator={NAME}"], 0),
    (["show", f"{NAME}.yaml"], MissingFileError.exit_code),
    (["train", "recipe.yaml", "task.kind=summarization", f"task.separator={NAME}", "--print-config"], 0),
    (["train", f"{NAME}.yaml"], MissingFileError.exit_code),
    (["estimate", "recipe.yaml", f"output_dir={NAME}", "--device", "t4"], 0),
    (["estimate", "recipe.yaml", f"model.path=./{NAME}"], 31),
    (["fit", "recipe.yaml", f"model.path=./{NAME}", "--budget", "1GiB"], 31),
    (["run", "suite.yaml", f"output_dir={NAME}", "--dry-run"], 0),
    (["submit", "recipe.yaml", f"output_dir={NAME}", "--dry-run"], 0),
    (["evaluate", NAME], RecordError.exit_code),
    (["--help"], 0),
    (["report", f"--no-{NAME}"], 2),
    ([NAME], 2),
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a recipe, a suite, and two result folders with a run whose name is not ASCII."""
    write_project(tmp_path)
    (tmp_path / "suite.yaml").write_text("name: s\nrecipes: [recipe.yaml]\n", encoding="utf-8")
    write_suite(tmp_path / "A", build_run(NAME), build_run("b", peak=900))
    write_suite(tmp_path / "B", build_run(NAME, peak=800), build_run("b"))
    (tmp_path / "A" / f"{NAME} waits").mkdir()
    (tmp_path / "A" / f"{NAME} waits" / "recipe.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue
    return tmp_path


def _open_streams(encoding: str, monkeypatch: pytest.MonkeyPatch) -> Streams:
    """Replace standard output and error by strict streams of an encoding; return what they write to."""
    streams = io.BytesIO(), io.BytesIO()
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding, errors="strict", write_through=True))
    return streams


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize(("arguments", "exit_code"), COMMANDS, ids=[" ".join(arguments) for arguments, _ in COMMANDS])
def test_command_replaces_characters(
    arguments: list[str], exit_code: int, encoding: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit code is that of a terminal which can print everything."""
    streams = _open_streams(encoding, monkeypatch)
    program: Callable[..., None] = app
    if arguments[0] in {"train", "evaluate"}:  # the command's last action is to ignore signals
        monkeypatch.setattr("peftbench.run.shutdown.ignore_signals", lambda: None)
    with pytest.raises(SystemExit) as raised:
        program(arguments, prog_name="peftbench")
    printed = b"".join(stream.getvalue() for stream in streams)
    monkeypatch.undo()
    assert raised.value.code == exit_code
    assert printed
    assert b"Traceback" not in printed
    if exit_code and arguments != ["report", f"--no-{NAME}"]:
        assert b"??" in printed


@pytest.mark.parametrize(("program", "exit_code"), [(train.app, 14), (slurm_folder.app, 14)])
def test_entry_points_replace_characters(
    program: Callable[..., None], exit_code: int, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launch script and the helper of job scripts are command lines of their own."""
    _, stderr = _open_streams("ascii", monkeypatch)
    with pytest.raises(SystemExit) as raised:
        program(["--config", f"{NAME}.yaml"])
    printed = stderr.getvalue()
    monkeypatch.undo()
    assert raised.value.code == exit_code
    assert b"?t????.yaml" in printed


def test_bytes_of_a_file_name_are_printed_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that a script reads from the output stays the path of the file, in ASCII and in UTF-8."""
    for encoding in ("ascii", "utf-8"):
        stdout, _ = _open_streams(encoding, monkeypatch)
        replace_unencodable_characters()
        print(os.fsdecode(b"caf\xe9/") + "\u2013" + os.fsdecode(b"\xff"))  # noqa: T201
        printed = stdout.getvalue()
        monkeypatch.undo()
        dash = b"?" if encoding == "ascii" else "\u2013".encode()
        assert printed == b"caf\xe9/" + dash + b"\xff\n"


def test_stream_without_an_encoding_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream in memory, or a closed one (None), has nothing to configure."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    replace_unencodable_characters()
    assert isinstance(sys.stdout, io.StringIO)


def test_undecodable_name_can_be_written() -> None:
    """Bytes that are UTF-8 become their characters, others the replacement character."""
    assert make_encodable("w\udcc3\udca4rt \udce9 ok–") == "wärt \ufffd ok–"


def test_locale_without_unicode_ends_in_no_traceback(project: Path) -> None:
    """With LANG=C the names of folders are bytes; the report and its files are written."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment.pop("PYTHONIOENCODING", None)
    for command in ("report", "status"):
        program = [sys.executable, "-c", "from peftbench.cli.app import main; main()", command, "A"]
        done = subprocess.run(program, cwd=project, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    assert f"{NAME} waits".encode() in done.stdout
    for name in (PAGE_FILE, RESULTS_FILE):
        assert f"{NAME} waits" in (project / "A" / name).read_text(encoding="utf-8")
