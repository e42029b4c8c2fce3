"""Small or read-only file systems for tests. Mounting one needs root."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mount_tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """Mount a tmpfs with ``options``, e.g. ``size=4k`` or ``ro``, at ``folder``; skip the test if this user cannot.

    File permissions cannot replace it: tests in containers run as root, which ignores them.
    """
    if shutil.which("mount") is None or shutil.which("umount") is None:
        pytest.skip("the mount command was not found")
    folder.mkdir(parents=True)
    result = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        pytest.skip(f"this user cannot mount a tmpfs: {result.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
