"""Helpers that run suites on a cluster and locally, and compare their records."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

VARYING_FIELDS = frozenset(
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
        "git_commit",
    }
)
"""Fields that may differ between equal runs: times, memory, the place of the run, attempts, edits in the checkout."""


def peftbench(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a ``peftbench`` command and return the completed process."""
    command = [sys.executable, "-c", "from peftbench.cli.app import main; main()", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )


def record(runs: Path, name: str) -> dict[str, Any]:
    """Return the record of a run."""
    values: dict[str, Any] = json.loads((runs / name / "record.json").read_text(encoding="utf-8"))
    return values


def read_statuses(folder: Path, runs: str, environment: dict[str, str]) -> list[dict[str, Any]]:
    """Return the rows of ``peftbench status``, one for each run."""
    result = peftbench(folder, environment, "status", runs, "--json")
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def assert_equal_results(interrupted: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """Check that the interrupted run ended as ok, and that its record is bit-identical except in varying fields."""
    assert interrupted["outcome"]["kind"] == "ok", interrupted["outcome"]
    assert interrupted.keys() == undisturbed.keys()
    different = [key for key in interrupted if key not in VARYING_FIELDS and interrupted[key] != undisturbed[key]]
    assert not different, f"{interrupted['name']}: {different}"
