"""Suites as a user runs them, on a cluster and without, and what must be the same of both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CLOCKED = frozenset(
    {
        "started_at",
        "recipe",
        "step_seconds",
        "resumed_after",
        "phase_seconds",
        "throughput",
        "memory",
        "memory_by_rank",
        "step_part_seconds",
        "part_timed_steps",
        "compute",
        "energy_joules",
        "notes",
    }
)
"""What a clock or the system's memory says in a record, or where and how often it was run."""


def peftbench(folder: Path, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """What a command did."""
    command = [sys.executable, "-c", "from peftbench.cli.app import main; main()", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )


def record(runs: Path, name: str) -> dict[str, Any]:
    """A run's record."""
    found: dict[str, Any] = json.loads((runs / name / "record.json").read_text(encoding="utf-8"))
    return found


def standing(folder: Path, runs: str, environment: dict[str, str]) -> list[dict[str, Any]]:
    """How the runs stand."""
    told = peftbench(folder, environment, "status", runs, "--json")
    assert told.returncode == 0, told.stderr
    found: list[dict[str, Any]] = json.loads(told.stdout)
    return found


def assert_same(interrupted: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """Each a run's record: complete, and equal to the last bit in all that no clock says."""
    assert interrupted["outcome"]["kind"] == "ok", interrupted["outcome"]
    assert interrupted.keys() == undisturbed.keys()
    other = [key for key in interrupted if key not in CLOCKED and interrupted[key] != undisturbed[key]]
    assert not other, f"{interrupted['name']}: {other}"
