"""The feature cache in whole processes: two processes share it, and a killed run resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.paths import REPOSITORY
from tests.launch.test_run_suite import record_of, run

EPOCHS, STEPS = 3, 6
ARGUMENTS = [
    "--config",
    "recipe.yaml",
    f"train.steps={STEPS}",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "profile.untimed_steps=1",
    "model.dropout=0.0",
    "optimizer.learning_rate=0.01",
]
METHODS = ("last_layer", "last_blocks")


def one_process(*arguments: str) -> list[str]:
    """Return the command of a run in one process."""
    return [sys.executable, "-m", "peftbench.train", *ARGUMENTS, *arguments]


def two_processes(engine: str, folder: Path, *arguments: str) -> list[str]:
    """Return the command of a run in two processes.

    It must run in the repository, because engine configs refer to each other by relative paths.
    """
    (folder / "recipe.yaml").write_text(
        (folder / "recipe.yaml").read_text(encoding="utf-8").replace(" rows.jsonl", f" {folder}/rows.jsonl"),
        encoding="utf-8",
    )
    arguments_with_path = [argument.replace("recipe.yaml", str(folder / "recipe.yaml")) for argument in ARGUMENTS]
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"accel_configs/{engine}.yaml",
        "--num_processes",
        "2",
        "-m",
        "peftbench.train",
        *arguments_with_path,
        f"output_dir={folder / 'out'}",
        *arguments,
    ]


def load_weights(folder: Path, name: str) -> torch.Tensor:
    """Return the values of all weights that a run saved, trained and frozen."""
    weights = load_file(folder / "out" / name / "model" / "model.safetensors")
    return torch.cat([weights[key].flatten() for key in sorted(weights)])


def find_stores(caches: dict[str, str]) -> list[Path]:
    """Return the folders of the stores in the cache."""
    return [path.parent for path in Path(caches["PEFTBENCH_CACHE"]).glob("feature_cache/*/features")]


@pytest.fixture
def own_cache(caches: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Return the environment with a cache for this test only."""
    return caches | {"PEFTBENCH_CACHE": str(tmp_path / "cache"), "DS_ACCELERATOR": "cpu"}


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["cpu2", "zero1", "zero2"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_share_one_store(method: str, engine: str, project: Path, own_cache: dict[str, str]) -> None:
    """Losses, weights and model FLOPs match one process without a cache, with a new store and with a complete one.

    With ``zero2`` each process holds half of the gradients, averaged over micro-batches that skip the frozen part.
    """
    kind = f"method.kind={method}"
    plain = run(one_process(kind, "name=plain"), project, own_cache)
    assert plain.returncode == 0, plain.stderr
    first = run(two_processes(engine, project, kind, "train.feature_cache=fp32", "name=first"), REPOSITORY, own_cache)
    assert first.returncode == 0, first.stderr
    second = run(two_processes(engine, project, kind, "train.feature_cache=fp32", "name=second"), REPOSITORY, own_cache)
    assert second.returncode == 0, second.stderr
    records = {name: record_of(project, name) for name in ("plain", "first", "second")}
    expected = records["plain"]
    for name in ("first", "second"):
        record = records[name]
        assert record["device"]["num_processes"] == 2
        assert record["step_losses"] == pytest.approx(expected["step_losses"], rel=1e-5)
        assert record["step_losses"][-1] < record["step_losses"][0]
        assert record["quality"]["loss"] == pytest.approx(expected["quality"]["loss"], rel=1e-5)
        assert record["flops"]["model_flops"] == expected["flops"]["model_flops"]
        assert record["flops"]["counted_step"]["counted_flops"] == record["flops"]["counted_step"]["closed_form_flops"]
        weights, expected_weights = load_weights(project, name), load_weights(project, "plain")
        assert float((weights - expected_weights).norm()) < 1e-4 * float(expected_weights.norm())
    hardware_flops = [records[name]["flops"]["hardware_flops"] for name in ("plain", "first", "second")]
    without, filling, reading = hardware_flops
    assert without - reading == EPOCHS * (filling - reading) > 0
    (store,) = find_stores(own_cache)
    assert (store / "completed").read_bytes() == b"\1" * 8


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 4], ids=["in_the_first_epoch", "in_the_third"])
@pytest.mark.parametrize("method", METHODS)
def test_killed_run_with_feature_cache_resumes(
    method: str, after: int, project: Path, own_cache: dict[str, str]
) -> None:
    """After SIGKILL the remaining steps match an undisturbed run."""
    kind = f"method.kind={method}"
    overrides = (kind, "train.feature_cache=fp32", "checkpoint.interval=1")
    plain = run(one_process(kind, "name=plain"), project, own_cache)
    assert plain.returncode == 0, plain.stderr
    process = subprocess.Popen(
        one_process("name=killed", *overrides),
        cwd=project,
        env=own_cache,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(project.glob(f"out/killed/checkpoints/*/step-{after:08d}")):
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = run(one_process("name=killed", *overrides), project, own_cache)
    assert resumed.returncode == 0, resumed.stderr
    record, expected = record_of(project, "killed"), record_of(project, "plain")
    assert record["resumed_after"][0] >= after
    assert record["step_losses"] == pytest.approx(expected["step_losses"], rel=1e-6)
    weights, expected_weights = load_weights(project, "killed"), load_weights(project, "plain")
    assert float((weights - expected_weights).norm()) < 1e-5 * float(expected_weights.norm())
    (store,) = find_stores(own_cache)
    assert (store / "durable").exists()
