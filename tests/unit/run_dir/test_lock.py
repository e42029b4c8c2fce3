"""A run's folder belongs to one process at a time, and to none that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from peftbench.errors import RunLockedError
from peftbench.run_dir.lock import Lock, is_locked, raise_if_locked
from peftbench.run_dir.status import StatusWriter

HOLD = """
import sys, time
from pathlib import Path
from peftbench.run_dir.lock import Lock
lock = Lock(Path(sys.argv[1])); lock.acquire(); print("held", flush=True); time.sleep(100)
"""


def test_the_second_is_refused(tmp_path: Path) -> None:
    """In one sentence that says who holds it; what was let go of can be held."""
    first, second = Lock(tmp_path), Lock(tmp_path)
    assert not is_locked(tmp_path)
    first.acquire()
    StatusWriter(tmp_path, enabled=True).set_phase("train")
    assert is_locked(tmp_path)
    for refused in (second.acquire, lambda: raise_if_locked(tmp_path)):
        with pytest.raises(RunLockedError, match=rf"is in use by process {os.getpid()} on .*stop it first"):
            refused()
    first.release()
    second.acquire()
    second.release()
    assert not is_locked(tmp_path)


def test_it_dies_with_its_holder(tmp_path: Path) -> None:
    """After kill -9 nothing is left to be cleaned up."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert is_locked(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not is_locked(tmp_path)
    lock = Lock(tmp_path)
    lock.acquire()
    lock.release()


def test_a_refused_run_leaves_no_file(tmp_path: Path) -> None:
    """A folder in which there is nothing else keeps no lock; one with a record does."""
    lock = Lock(tmp_path)
    lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock.acquire()
    (tmp_path / "record.json").touch()
    lock.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "record.json"]


def test_looking_changes_nothing(tmp_path: Path) -> None:
    """Whoever asks whether a folder is held makes no file there."""
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []
