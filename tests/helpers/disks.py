"""File systems that are really full or really read-only, where a test may mount one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs with ``options`` (``size=4k``, ``ro``) at ``folder``; skips the test where this user may not mount one.

    Permissions would not do: root, as which tests run in containers, may write everywhere.
    """
    if shutil.which("mount") is None or shutil.which("umount") is None:
        pytest.skip("there is no mount command")
    folder.mkdir(parents=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"this user cannot mount a tmpfs: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
