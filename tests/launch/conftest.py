"""Fixtures that run the entry point in a subprocess, in a temporary folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.project import LAUNCH, write_project


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return the working directory of commands, with a valid recipe and its examples."""
    folder = tmp_path / "work"
    folder.mkdir()
    return write_project(folder)


@pytest.fixture
def launch(project: Path, caches: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs ``python launch/train.py``; ``env`` adds to the environment."""

    def run_train_script(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(LAUNCH), *arguments]
        return subprocess.run(
            command, cwd=project, env=caches | (env or {}), capture_output=True, text=True, check=False
        )

    return run_train_script
