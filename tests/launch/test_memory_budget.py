"""A run under a budget is really refused memory, says so, and holds up nobody."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftbench.record import RunRecord, read_record
from tests.helpers.paths import REPOSITORY
from tests.launch.conftest import RECIPE
from tests.launch.test_run_suite import peftbench, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA holds a process on Linux alone")
MIB = 2**20
TOO_LITTLE, ENOUGH = 136, 400
"""MiB for the shipped base with AdamW in fp32: weights, gradients and moments take 67, activations and logits 88."""
CPU2 = REPOSITORY / "accel_configs" / "cpu2.yaml"
_STARVED = """
import os
import peftbench.run.oom

limit_memory = peftbench.run.oom.limit_memory
starved = os.environ["RANK"] in os.environ["STARVED"]
peftbench.run.oom.limit_memory = lambda budget, *rest: limit_memory(budget if starved else 4 * 2**30, *rest)

from peftbench.train import main

main()
"""


@pytest.fixture
def full(project: Path) -> Path:
    """A recipe of full fine-tuning, all rows in one micro-batch and as long as can be."""
    recipe: dict[str, Any] = RECIPE | {
        "method": {"kind": "full"},
        "train": {"steps": 3, "global_batch_size": 8},
        "data": {**RECIPE["data"], "padding": "max_length"},  # type: ignore[dict-item]
        "save_model": False,  # type: ignore[dict-item]
        "profile": {"untimed_steps": 1},
        "evaluate": {**RECIPE["evaluate"], "batch_size": 1},  # type: ignore[dict-item]
    }
    path = project / "full.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def refused(project: Path) -> RunRecord:
    """The record of a run that was out of memory, which says all that is known."""
    record = read_record(project / "out" / "run" / "record.json")
    outcome = record.outcome
    assert outcome.kind == "oom"
    assert outcome.phase in {"warmup", "train"}
    assert outcome.step_part in {"forward", "backward", "optimizer"}
    assert outcome.requested_bytes is not None
    assert outcome.in_use_bytes is not None
    assert outcome.in_use_bytes <= TOO_LITTLE * MIB
    assert outcome.estimated_peak_bytes is not None
    assert {"load", "build", "warmup"} <= set(record.memory) & set(record.phase_seconds)
    assert record.parameters is not None
    return record


def test_a_run_is_refused_and_what_is_suggested_fits(
    full: Path, project: Path, launch: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Its record has what was asked for, held and needed; and the suggestion, followed, runs under that very budget."""
    done = launch("--config", str(full), f"budget.memory={TOO_LITTLE}MiB")
    assert done.returncode == 70, done.stderr
    assert "Traceback" not in done.stderr
    record = refused(project)
    assert record.outcome.rank is None
    assert record.outcome.estimated_peak_bytes is not None
    assert record.outcome.estimated_peak_bytes > TOO_LITTLE * MIB
    suggestion = record.outcome.suggestion
    assert suggestion is not None
    assert json.loads(done.stdout.splitlines()[-1])["suggestion"] == suggestion
    changes = [word for word in suggestion.split(" is predicted")[0].split() if "=" in word]
    assert changes
    followed = launch("--config", str(full), f"budget.memory={TOO_LITTLE}MiB", *changes)
    assert followed.returncode == 0, followed.stderr
    assert read_record(project / "out" / "run" / "record.json").recipe["train"]["global_batch_size"] == 8


def test_enough_is_enough(full: Path, launch: Callable[..., subprocess.CompletedProcess[str]], project: Path) -> None:
    """The same run under a budget with room; its peak is counted as the budget is."""
    done = launch("--config", str(full), f"budget.memory={ENOUGH}MiB")
    assert done.returncode == 0, done.stderr
    memory = read_record(project / "out" / "run" / "record.json").memory["train"]
    assert memory.rss_bytes is not None
    assert memory.baseline_rss_bytes is not None
    assert TOO_LITTLE * MIB < memory.rss_bytes - memory.baseline_rss_bytes < ENOUGH * MIB


def test_a_suite_goes_on_after_a_refusal(full: Path, project: Path, caches: dict[str, str]) -> None:
    """A run that is out of memory is a row with the bytes that it needs, and the next one starts."""
    (project / "suite.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "tight",
                "recipes": [full.name],
                "overrides": ["save_model=false"],
                "axes": {"budget.memory": [f"{TOO_LITTLE}MiB", f"{ENOUGH}MiB"]},
            }
        ),
        encoding="utf-8",
    )
    done = run(peftbench("compare", "suite.yaml"), project, caches)
    assert done.returncode == 0, done.stderr
    assert f"run-memory={TOO_LITTLE}MiB: oom" in done.stderr
    assert f"run-memory={ENOUGH}MiB: ok" in done.stderr
    record = read_record(project / "out" / f"run-memory={TOO_LITTLE}MiB" / "record.json")
    assert record.outcome.estimated_peak_bytes is not None
    report = (project / "out" / "RESULTS.md").read_text(encoding="utf-8")
    assert re.search(rf"\| +{record.outcome.estimated_peak_bytes / MIB:,.0f} \|", report)
    assert "needs MiB" in report
    assert f"held {(record.outcome.in_use_bytes or 0) / MIB:,.1f} MiB" in report
    assert "is predicted to fit" in report


@pytest.mark.multiprocess
@pytest.mark.parametrize("starved", ["1", *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in ("0", "01"))])
def test_no_rank_waits_for_one_that_is_out_of_memory(
    starved: str, full: Path, project: Path, caches: dict[str, str]
) -> None:
    """Whichever of two it is, or both, they end soon, one record says which it was, and nothing else is left behind."""
    script = project / "starved.py"
    script.write_text(_STARVED, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CPU2),
        "--main_process_port",
        "0",
        str(script),
        "--config",
        str(full),
        f"budget.memory={TOO_LITTLE}MiB",
        "train.global_batch_size=16",
    ]
    done = subprocess.run(
        command,
        cwd=project,
        env=caches | {"STARVED": starved},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode != 0
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["outcome"] == "oom", done.stderr
    assert [text for text in done.stdout.splitlines() if text.startswith("{")] == [done.stdout.splitlines()[-1]]
    assert str(refused(project).outcome.rank) in starved
    assert {path.name for path in (project / "out" / "run").iterdir()} == {".lock", "record.json", "status.json"}


@pytest.mark.slow
def test_auto_is_what_fits(full: Path, launch: Callable[..., subprocess.CompletedProcess[str]], project: Path) -> None:
    """The largest micro-batch that is predicted to fit is taken and noted, and the recipe stays as it was asked."""
    done = launch("--config", str(full), "budget.memory=150MiB", "train.micro_batch_size=auto")
    assert done.returncode == 0, done.stderr
    record = read_record(project / "out" / "run" / "record.json")
    assert record.recipe["train"]["micro_batch_size"] == "auto"
    assert record.engine is not None
    assert record.engine.micro_batch_size is not None
    assert 1 <= record.engine.micro_batch_size < 8
    assert record.engine.micro_batch_size * record.engine.gradient_accumulation_steps >= 8
    (note,) = record.notes
    assert note == (
        f"train.micro_batch_size=auto became {record.engine.micro_batch_size}, the most that is predicted to fit 150 MiB"
    )


@pytest.mark.slow
def test_the_edge_is_proved_by_running_it(full: Path, project: Path, caches: dict[str, str]) -> None:
    """The answer runs under the budget, and the next larger micro-batch is out of memory."""
    done = run(
        peftbench(
            "fit",
            "--config",
            full.name,
            "train.global_batch_size=8",
            "--device",
            "cpu",
            "--budget",
            "150MiB",
            "--allow",
            "",
            "--verify",
            "--json",
        ),
        project,
        caches,
    )
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)["proof"]
    sizes = sorted(map(int, proof["outcomes"]))
    assert {proof["outcomes"][str(size)] for size in sizes if size <= proof["largest"]} == {"ok"}
    assert {proof["outcomes"][str(size)] for size in sizes if size > proof["largest"]} == {"oom"}
    assert proof["predicted"] <= proof["largest"]  # what is said to fit does
    assert not (project / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["budget.memory=lots"], 13, "budget.memory='lots': 'lots' is no size of memory; write it as 16GiB"),
        (["budget.memory=900TiB"], 80, "is more than the"),
        (["budget.memory=2MiB"], 80, "that a process on CPU takes beside its tensors; give more"),
        (
            ["train.micro_batch_size=auto"],
            80,
            "train.micro_batch_size=auto needs to know what is to fit; set budget.memory",
        ),
        (["train.micro_batch_size=many"], 13, "must be a number of examples, auto or null"),
    ],
)
def test_what_cannot_be_meant(
    arguments: list[str], code: int, said: str, project: Path, launch: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """One sentence, a code of its own, and nothing is written."""
    done = launch("--config", "recipe.yaml", *arguments)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "out").exists()
