"""The progress bar of a run on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftbench.methods.lora import Lora
from peftbench.run_dir.status import read_status
from tests.helpers.project import LAUNCH
from tests.helpers.workshop import Workshop

COLUMNS = 80
MIB = 2**20
LINE_WITHOUT_BUDGET = re.compile(
    r"run \|.+\| (\d)/6, loss (\d+\.\d{3}), [\d,]+ tokens/s, [\d,]+ [KMG]iB, \d\d:\d\d left *"
)
LINE = re.compile(r"run \|.+\| (\d)/6, loss (\d+\.\d{3}), [\d,]+ tokens/s, (\d+) of 1,024 MiB, \d\d:\d\d left *")


def open_terminal() -> tuple[int, int]:
    """Return the controlling end and the other end of a new terminal with ``COLUMNS`` columns."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    return controller, terminal


def read_chunks(controller: int) -> Iterator[bytes]:
    """Yield what is written to a terminal until every process has closed it."""
    try:
        while chunk := os.read(controller, 65536):
            yield chunk
    except OSError:  # Linux raises EIO once every process has closed the terminal
        pass
    finally:
        os.close(controller)


def read_terminal(command: list[str], folder: Path, env: dict[str, str]) -> str:
    """Run a command and return its stderr, which is a terminal with ``COLUMNS`` columns."""
    controller, terminal = open_terminal()
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=terminal)
    os.close(terminal)
    output = b"".join(read_chunks(controller))
    assert process.wait(60) == 0, output.decode()
    return output.decode()


@pytest.mark.skipif(sys.platform != "linux", reason="terminals differ")
def test_progress_line_of_a_run_in_this_process(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the line has step, loss, tokens/s, memory and time left; the status file has the same loss."""
    controller, terminal = open_terminal()
    output: list[bytes] = []
    reader = threading.Thread(target=lambda: output.extend(read_chunks(controller)))
    reader.start()
    with os.fdopen(terminal, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        workshop.run(workshop.recipe(Lora(r=2), train={"steps": 6}))
    reader.join(60)
    text = b"".join(output).decode()
    progress, _, _ = text[text.index("run |") :].partition("\n")
    lines = [line for line in progress.split("\r") if line.startswith("run |")]
    assert all(len(line) <= COLUMNS for line in lines)
    assert "0/6, ? left" in lines[0]
    matches = [LINE_WITHOUT_BUDGET.fullmatch(text) for text in lines[1:]]
    assert all(matches), lines
    last = matches[-1]
    assert last is not None
    assert last[1] == "6"
    status = read_status(workshop.output / "run")
    assert status is not None
    assert status.loss is not None
    assert f"{status.loss:.3f}" == last[2]
    assert status.budget_bytes is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a memory budget on CPU needs Linux")
def test_progress_line_on_a_terminal(project: Path, caches: dict[str, str]) -> None:
    """The line has step, loss, tokens/s, memory and time left; the status file has the same values."""
    command = [sys.executable, str(LAUNCH), "--config", "recipe.yaml", "train.steps=6", "budget.memory=1GiB"]
    output = read_terminal(command, project, caches)
    progress, _, rest = output[output.index("run |") :].partition("\n")
    assert "run |" not in rest
    assert "held-out" in rest, "the table of the run follows"
    lines = [text for text in progress.split("\r") if text.startswith("run |")]
    assert all(len(text) <= COLUMNS for text in lines)
    assert "0/6, ? left" in lines[0]
    matches = [LINE.fullmatch(text) for text in lines[1:]]
    assert all(matches), lines
    last = matches[-1]
    assert last is not None
    assert last[1] == "6"
    status = read_status(project / "out" / "run")
    assert status is not None
    assert status.loss is not None
    assert f"{status.loss:.3f}" == last[2]
    assert status.memory_bytes is not None
    assert 0 < status.memory_bytes < 2**30
    assert status.memory_bytes / MIB == pytest.approx(int(last[3]), abs=64)
    assert status.budget_bytes == 2**30


@pytest.mark.slow
def test_no_progress_line_without_a_terminal(project: Path, caches: dict[str, str]) -> None:
    """Stderr has only the run's table, and the status file has the values."""
    command = [sys.executable, str(LAUNCH), "--config", "recipe.yaml", "train.steps=2"]
    done = subprocess.run(command, cwd=project, env=caches, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "run |" not in done.stderr
    assert "held-out" in done.stderr
    status = read_status(project / "out" / "run")
    assert status is not None
    assert (status.step, status.budget_bytes) == (2, None)
    assert status.loss is not None
    assert status.memory_bytes is None or status.memory_bytes > 0
