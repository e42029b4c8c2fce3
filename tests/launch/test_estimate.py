"""The estimate, as a user asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch.test_compare import peftbench, run


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


@pytest.mark.parametrize(("argument", "code", "said"), [
    (["--budget", "much"], 80, "'much' is no size of memory; write it as 16GiB"),
    (["--device", "t5"], 81, "did you mean 't4'?"),
    (["train.activation_offload=true"], 82, "activation offload is not predicted"),
    (["train.step=3"], 11, "there is no knob 'train.step'"),
])  # fmt: skip
def test_what_cannot_be_meant(argument: list[str], code: int, said: str, project: Path, caches: dict[str, str]) -> None:
    """One sentence and a code of its own."""
    done = run(peftbench("estimate", "--config", "recipe.yaml", *argument), project, caches)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


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
    assert "train.micro_batch=4" in done.stdout
    small = run(peftbench("fit", "--config", "recipe.yaml", "--budget", "64MiB"), project, caches)
    assert small.returncode == 1
    assert "nothing that was tried fits 64 MiB, not even with micro-batches of one example" in small.stdout
    nothing = run(peftbench("fit", "--config", "recipe.yaml"), project, caches)
    assert (nothing.returncode, nothing.stdout) == (80, "")
    assert "give --budget, as 16GiB, or --device" in nothing.stderr
