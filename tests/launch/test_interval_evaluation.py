"""Evaluation during training in whole processes: it changes no loss on any engine, and survives SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import REPOSITORY
from tests.launch.test_run_suite import record_of, run

STEPS = 8
OVERRIDES = [
    f"train.steps={STEPS}",
    "model.dropout=0.1",
    "evaluate.split=validation",
    "evaluate.batch_size=3",
    "schedule.kind=constant",
    "optimizer.learning_rate=0.01",
]
EVALUATION = ["evaluate.interval=2", "checkpoint.keep_best=true", "evaluate.general_text=shipped"]
CONFIGS = {"ddp": "cpu2", "fsdp2": "fsdp2", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3"}
METHODS = ("lora", "full", "prompt_tuning", "last_layer")


def launch(engine: str | None, project: Path, *overrides: str) -> list[str]:
    """Return the command that trains on two processes of an engine, or on one process without a launcher.

    It works in any directory; the accelerate files of DeepSpeed name files relative to the repository.
    """
    rows = project / "rows.jsonl"
    paths = [f"data.source.{split}={rows}" for split in ("train", "validation", "test")]
    arguments = ["--config", str(project / "recipe.yaml"), f"output_dir={project / 'out'}", *paths, *OVERRIDES]
    script = ["-m", "peftbench.train", *arguments, *overrides]
    if engine is None:
        return [sys.executable, *script]
    config = REPOSITORY / "accel_configs" / f"{CONFIGS[engine]}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launcher, "--num_processes", "2", "--main_process_port", "0", *script]


def train(command: list[str], project: Path, caches: dict[str, str]) -> dict[str, Any]:
    """Run a command that succeeds; return the record of the run that its last override names."""
    done = run(command, REPOSITORY, caches | {"DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr
    return record_of(project, command[-1].removeprefix("name="))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("engine", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_two_processes(engine: str, method: str, project: Path, caches: dict[str, str]) -> None:
    """Losses are equal to the last bit with and without it; the final evaluation has the lowest loss of the curve."""
    plain = train(launch(engine, project, f"method.kind={method}", "name=plain"), project, caches)
    record = train(launch(engine, project, f"method.kind={method}", *EVALUATION, "name=evaluated"), project, caches)
    assert record["engine"]["name"] == engine
    assert record["device"]["num_processes"] == 2
    assert record["step_losses"] == plain["step_losses"]
    curve = record["held_out_curve"]
    losses = {point["step"]: point["loss"] for point in curve["points"]}
    assert list(losses) == [2, 4, 6, 8]
    assert losses[curve["kept_step"]] == min(losses.values()) == pytest.approx(record["quality"]["loss"], rel=1e-6)
    if curve["kept_step"] == STEPS:
        assert losses[STEPS] == pytest.approx(plain["quality"]["loss"], rel=1e-6)
    assert record["forgetting"]["loss_before"] != record["forgetting"]["loss_after"]
    assert not (project / "out" / "evaluated" / "best_weights").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kill_step", [3, 5])
def test_best_step_and_patience_survive_a_kill(kill_step: int, project: Path, caches: dict[str, str]) -> None:
    """After SIGKILL the run stops at the same step, with the same curve and best weights, as an undisturbed one."""
    overrides = [
        "evaluate.interval=1",
        "checkpoint.keep_best=true",
        "checkpoint.interval=1",
        "early_stopping.patience=4",
        "optimizer.learning_rate=0.1",
        "train.steps=40",
    ]
    expected = train(launch(None, project, *overrides, "name=whole"), project, caches)
    assert expected["stopped_early"]
    assert expected["held_out_curve"]["kept_step"] == expected["steps"] - 4
    process = subprocess.Popen(
        launch(None, project, *overrides, "name=killed"),
        cwd=REPOSITORY,
        env=caches,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(project.glob(f"out/killed/checkpoints/*/step-{kill_step:08d}")):
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    record = train(launch(None, project, *overrides, "name=killed"), project, caches)
    assert record["resumed_after"][0] >= kill_step
    assert record["step_losses"] == expected["step_losses"]
    assert record["steps"] == expected["steps"]
    for key in ("step", "loss"):
        points = [[point[key] for point in one["held_out_curve"]["points"]] for one in (record, expected)]
        assert points[0] == points[1]
    assert record["held_out_curve"]["kept_step"] == expected["held_out_curve"]["kept_step"]
    assert record["quality"] == expected["quality"]
