"""The feature cache with real processes: several of them, and one that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.paths import REPOSITORY
from tests.launch.test_run_suite import record_of, run

EPOCHS, STEPS = 3, 6
ARGUMENTS = [
    "--config",
    "recipe.yaml",
    "method.kind=last_layer",
    f"train.steps={STEPS}",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "profile.untimed_steps=1",
    "model.dropout=0.0",
    "optimizer.learning_rate=0.01",
]
HEAD = "lm_head.weight"


def one_process(*arguments: str) -> list[str]:
    """The command line of a run by itself."""
    return [sys.executable, "-m", "peftbench.train", *ARGUMENTS, *arguments]


def two_processes(engine: str, folder: Path, *arguments: str) -> list[str]:
    """The command line of a run in two, from the repository, where the files of engines name each other."""
    (folder / "recipe.yaml").write_text(
        (folder / "recipe.yaml").read_text(encoding="utf-8").replace(" rows.jsonl", f" {folder}/rows.jsonl"),
        encoding="utf-8",
    )
    asked = [argument.replace("recipe.yaml", str(folder / "recipe.yaml")) for argument in ARGUMENTS]
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
        *asked,
        f"output_dir={folder / 'out'}",
        *arguments,
    ]


def head_of(folder: Path, name: str) -> object:
    """What a run has trained."""
    return load_file(folder / "out" / name / "model" / "model.safetensors")[HEAD]


def states_of(caches: dict[str, str]) -> list[Path]:
    """Stores in the cache."""
    return [path.parent for path in Path(caches["PEFTBENCH_CACHE"]).glob("trunk/*/states")]


@pytest.fixture
def own(caches: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment with a cache of the test's own."""
    return caches | {"PEFTBENCH_CACHE": str(tmp_path / "cache"), "DS_ACCELERATOR": "cpu"}


@pytest.mark.multiprocess
@pytest.mark.parametrize("engine", [pytest.param(name, marks=pytest.mark.slow) for name in ("cpu2", "zero1", "zero2")])
def test_two_processes_share_one_store(engine: str, project: Path, own: dict[str, str]) -> None:
    """Each reads what the other computed: losses, head and FLOPs are those of one process over the same store or none.

    ``zero2`` gives each half of the gradients, which must be averaged over micro-batches that skip the trunk.
    """
    plain = run(one_process("name=plain"), project, own)
    assert plain.returncode == 0, plain.stderr
    kept = run(two_processes(engine, project, "train.feature_cache=fp32", "name=kept"), REPOSITORY, own)
    assert kept.returncode == 0, kept.stderr
    again = run(two_processes(engine, project, "train.feature_cache=fp32", "name=again"), REPOSITORY, own)
    assert again.returncode == 0, again.stderr
    records = {name: record_of(project, name) for name in ("plain", "kept", "again")}
    expected = records["plain"]
    for name in ("kept", "again"):
        record = records[name]
        assert record["device"]["num_processes"] == 2
        assert record["step_losses"] == pytest.approx(expected["step_losses"], rel=1e-5)
        assert record["step_losses"][-1] < record["step_losses"][0]
        assert record["quality"]["loss"] == pytest.approx(expected["quality"]["loss"], rel=1e-5)
        assert record["flops"]["model_flops"] == expected["flops"]["model_flops"]
        assert record["flops"]["counted_step"]["counted_flops"] == record["flops"]["counted_step"]["closed_form_flops"]
        mine, theirs = head_of(project, name), head_of(project, "plain")
        assert float((mine - theirs).norm()) < 1e-4 * float(theirs.norm())  # type: ignore[operator,attr-defined]
    executed = [records[name]["flops"]["hardware_flops"] for name in ("plain", "kept", "again")]
    assert executed[0] - executed[2] == EPOCHS * (executed[1] - executed[2]) > 0
    (store,) = states_of(own)
    assert (store / "complete").read_bytes() == b"\1" * 8


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 4], ids=["in_the_first_epoch", "in_the_third"])
def test_killed_run_resumes(after: int, project: Path, own: dict[str, str]) -> None:
    """After SIGKILL the remaining steps match an undisturbed run."""
    knobs = ("train.feature_cache=fp32", "checkpoint.interval=1")
    plain = run(one_process("name=plain"), project, own)
    assert plain.returncode == 0, plain.stderr
    process = subprocess.Popen(
        one_process("name=kept", *knobs), cwd=project, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(project.glob(f"out/kept/checkpoints/*/step-{after:08d}")):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    ended = run(one_process("name=kept", *knobs), project, own)
    assert ended.returncode == 0, ended.stderr
    record, expected = record_of(project, "kept"), record_of(project, "plain")
    assert record["resumed_after"][0] >= after
    assert record["step_losses"] == pytest.approx(expected["step_losses"], rel=1e-6)
    mine, theirs = head_of(project, "kept"), head_of(project, "plain")
    assert float((mine - theirs).norm()) < 1e-5 * float(theirs.norm())  # type: ignore[operator,attr-defined]
    (store,) = states_of(own)
    assert (store / "sealed").exists()
