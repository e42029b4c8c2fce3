"""The estimate, as a user asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.paths import REPOSITORY
from tests.launch.test_run_suite import peftbench, run


def test_a_plan_is_printed(project: Path, caches: dict[str, str]) -> None:
    """A table and sentences, or JSON; nothing is written."""
    said = run(peftbench("estimate", "--config", "recipe.yaml", "--device", "t4"), project, caches)
    assert said.returncode == 0, said.stderr
    assert "| backward" in said.stdout
    assert "in 14,909 MiB: fits" in said.stdout
    assert "uncalibrated" in said.stdout
    plan = json.loads(
        run(peftbench("estimate", "--config", "recipe.yaml", "--budget", "1GiB", "--json"), project, caches).stdout
    )
    assert plan["budget_bytes"] == 2**30
    assert not (project / "out").exists()


@pytest.mark.parametrize(
    ("argument", "code", "said"),
    [
        (["--budget", "much"], 80, "'much' is not a memory size; write it as, for example, 16GiB"),
        (["--device", "t5"], 81, "did you mean 't4'?"),
        (["model.quantization=int8"], 82, "outliers of an int8 base depend on its values"),
        (["--budget", "80GiB", "--device", "t4"], 80, "is more than the"),
        (["budget.memory=16GiB", "--device", "t4"], 80, "is more than the"),
        (["--budget", ""], 80, "'' is no size of memory"),
        (["train.micro_batch_size=auto"], 80, "what is it to fit? give --budget"),
        (["--suite", "nothing.yaml"], 80, "--suite says which recipes it is of"),
        (["train.step=3"], 11, "there is no knob 'train.step'"),
    ],
)
def test_what_cannot_be_meant(argument: list[str], code: int, said: str, project: Path, caches: dict[str, str]) -> None:
    """One sentence and a code of its own."""
    done = run(peftbench("estimate", "--config", "recipe.yaml", *argument), project, caches)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_what_fits_is_printed(project: Path, caches: dict[str, str]) -> None:
    """Each way with its largest micro-batch, and the knobs to run the first; none at all is said, with a code."""
    done = run(
        peftbench("fit", "--config", "recipe.yaml", "--budget", "2GiB", "--allow", "checkpointing,bf16"),
        project,
        caches,
    )
    assert done.returncode == 0, done.stderr
    for way in ("as it is", "checkpointing", "bf16", "checkpointing + bf16"):
        assert f"| {way} " in done.stdout
    assert "train.micro_batch_size=4" in done.stdout
    small = run(peftbench("fit", "--config", "recipe.yaml", "--budget", "64MiB"), project, caches)
    assert small.returncode == 1
    assert "nothing that was tried fits 64 MiB, not even with micro-batches of one example" in small.stdout
    nothing = run(peftbench("fit", "--config", "recipe.yaml"), project, caches)
    assert (nothing.returncode, nothing.stdout) == (80, "")
    assert "give --budget, as 16GiB, or --device" in nothing.stderr


def test_auto_is_planned_with_what_it_becomes(project: Path, caches: dict[str, str]) -> None:
    """The largest micro-batch that fits the budget, not a fault."""
    command = peftbench(
        "estimate", "--config", "recipe.yaml", "train.micro_batch_size=auto", "--budget", "2GiB", "--json"
    )
    done = run(command, project, caches)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 4


def test_a_suite_is_planned_run_by_run(project: Path, caches: dict[str, str]) -> None:
    """With the launcher that it names; a run that cannot be planned is told, and the others are."""
    (project / "two.yaml").write_text(
        "{distributed_type: MULTI_GPU, num_machines: 1, num_processes: 2, use_cpu: true, gpu_ids: '-1,-1'}",
        encoding="utf-8",
    )
    (project / "suite.yaml").write_text(
        "{name: s, recipes: [recipe.yaml], accelerate: two.yaml, axes: {train.global_batch_size: [4, 3]}}",
        encoding="utf-8",
    )
    done = run(peftbench("estimate", "--suite", "suite.yaml", "--budget", "2GiB", "--json"), project, caches)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert (first["name"], first["engine"], first["processes"], first["rows"]) == ("run-global_batch=4", "ddp", 2, 2)
    assert set(second) == {"name", "reason"}
    assert "3" in second["reason"]


def test_a_technique_that_an_engine_has_not_is_left_out(project: Path, caches: dict[str, str]) -> None:
    """Weights in bf16 do not run on ZeRO; what does is shown."""
    words = ["--allow", "checkpointing,bf16_weights", "--accelerate", "accel_configs/zero2.yaml", "--budget", "4GiB"]
    command = peftbench("fit", "--config", str(project / "recipe.yaml"), "method.kind=full", *words)
    done = run(command, REPOSITORY, caches)
    assert done.returncode == 0, done.stderr
    assert "| checkpointing " in done.stdout
    assert "bf16_weights" not in done.stdout
