"""The software environment of a run: versions of libraries and the commit of this package."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

_LIBRARIES = (
    "peftbench",
    "torch",
    "accelerate",
    "transformers",
    "peft",
    "datasets",
    "evaluate",
    "tokenizers",
    "deepspeed",
    "bitsandbytes",
)
"""Distributions that a measured number may depend on, in addition to the optimizers' libraries."""


def get_library_versions(optimizer_libraries: Iterable[str]) -> dict[str, str]:
    """Return the version of each installed library that a number may depend on."""
    versions = {}
    for name in dict.fromkeys([*_LIBRARIES, *optimizer_libraries]):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def get_git_commit() -> str | None:
    """Return the commit of the checkout that this package runs from, None if it is installed without one."""
    package_dir = os.fspath(Path(__file__).resolve().parent)
    command = ["git", "-C", package_dir, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
