"""A run started by one process resumes on two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_run_suite import CONFIG, record_of, run

STOP = """
from peftbench.training.checkpoint import CheckpointManager
from peftbench.train import main
save = CheckpointManager.save
def save_and_stop(*arguments):
    save(*arguments)
    raise KeyboardInterrupt
CheckpointManager.save = save_and_stop
main()
"""
ARGUMENTS = [
    "--config",
    "recipe.yaml",
    "train.steps=8",
    "checkpoint.interval=3",
    "profile.untimed_steps=2",
    "model.dropout=0.0",
]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_resume_with_more_processes(project: Path, caches: dict[str, str]) -> None:
    """The losses are the same; throughput excludes the steps of the first process."""
    undisturbed = run([sys.executable, "-m", "peftbench.train", *ARGUMENTS, "name=whole"], project, caches)
    assert undisturbed.returncode == 0, undisturbed.stderr
    stopped = run([sys.executable, "-c", STOP, *ARGUMENTS], project, caches)
    assert record_of(project, "run")["outcome"]["kind"] == "preempted", stopped.stderr
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "-m", "peftbench.train"]
    resumed: subprocess.CompletedProcess[str] = run([*launch, *ARGUMENTS], project, caches)
    assert resumed.returncode == 0, resumed.stderr
    record, whole = record_of(project, "run"), record_of(project, "whole")
    assert record["device"]["num_processes"] == 2
    assert record["resumed_after"] == [3]
    assert record["step_losses"] == pytest.approx(whole["step_losses"], rel=2e-5)
    assert record["quality"]["loss"] == pytest.approx(whole["quality"]["loss"], rel=2e-5)
    assert record["throughput"]["steps"] == 8 - 3 - 2
    assert record["flops"]["counted_step"] is None
    assert any("first 3 steps ran on 1 processes" in note for note in record["notes"])
    for kind in ("real", "labeled"):
        assert record["tokens"][kind] == whole["tokens"][kind]
