"""The lock of a run folder excludes other processes, and ends with its process."""

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

HOLD_LOCK = """
import sys, time
from pathlib import Path
from peftbench.run_dir.lock import Lock
lock = Lock(Path(sys.argv[1])); lock.acquire(); print("held", flush=True); time.sleep(100)
"""


def test_second_lock_is_refused(tmp_path: Path) -> None:
    """The error names the process that holds the lock; a released lock can be acquired."""
    first, second = Lock(tmp_path), Lock(tmp_path)
    assert not is_locked(tmp_path)
    first.acquire()
    StatusWriter(tmp_path, enabled=True).set_phase("train")
    assert is_locked(tmp_path)
    for acquire in (second.acquire, lambda: raise_if_locked(tmp_path)):
        with pytest.raises(RunLockedError, match=rf"is in use by process {os.getpid()} on .*stop it first"):
            acquire()
    first.release()
    second.acquire()
    second.release()
    assert not is_locked(tmp_path)


def test_killed_process_releases_its_lock(tmp_path: Path) -> None:
    """After kill -9 the folder is not locked."""
    process = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert is_locked(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not is_locked(tmp_path)
    lock = Lock(tmp_path)
    lock.acquire()
    lock.release()


def test_release_in_an_empty_folder_deletes_the_lock_file(tmp_path: Path) -> None:
    """In a folder with other files, the lock file stays."""
    lock = Lock(tmp_path)
    lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock.acquire()
    (tmp_path / "record.json").touch()
    lock.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "record.json"]


def test_is_locked_creates_no_file(tmp_path: Path) -> None:
    """Testing the lock does not change the folder."""
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []
