"""The progress line of a run on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from peftbench.run_dir.status import read_status
from tests.launch.conftest import LAUNCH

COLUMNS = 80
MIB = 2**20
LINE = re.compile(r"run \|.+\| (\d)/6, loss (\d+\.\d{3}), [\d,]+ tokens/s, (\d+) of 1,024 MiB, \d\d:\d\d left *")


def watched(command: list[str], folder: Path, env: dict[str, str]) -> str:
    """What a command writes to standard error, which is a terminal with so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 65536):
            seen += piece
    except OSError:  # how Linux says that nobody has the other end any more
        pass
    finally:
        os.close(ours)
    assert process.wait(60) == 0, seen.decode()
    return seen.decode()


@pytest.mark.skipif(sys.platform != "linux", reason="a run on CPU has a budget on Linux alone")
def test_progress_line_on_a_terminal(project: Path, caches: dict[str, str]) -> None:
    """One line has step, loss, tokens/s, memory and time left; the status file has the same values."""
    command = [sys.executable, str(LAUNCH), "--config", "recipe.yaml", "train.steps=6", "budget.memory=1GiB"]
    seen = watched(command, project, caches)
    begin, end = seen.index("run |"), seen.rindex("tokens/s")
    assert "\n" not in seen[begin:end]
    shown = [text for text in re.split(r"[\r\n]+", seen[begin:]) if text.startswith("run |")]
    assert all(len(text) <= COLUMNS for text in shown)
    assert "0/6, ? left" in shown[0]
    found = [LINE.fullmatch(text) for text in shown[1:]]
    assert all(found), shown
    last = found[-1]
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
    """The log is empty, and the status file has the values."""
    command = [sys.executable, str(LAUNCH), "--config", "recipe.yaml", "train.steps=2"]
    done = subprocess.run(command, cwd=project, env=caches, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    status = read_status(project / "out" / "run")
    assert status is not None
    assert (status.step, status.budget_bytes) == (2, None)
    assert status.loss is not None
    assert status.memory_bytes is None or status.memory_bytes > 0
