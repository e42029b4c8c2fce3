"""Runs under a memory budget: out of memory, suggestions, several ranks."""

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

from peftbench.memory.devices import get_device_facts
from peftbench.memory.search import MemoryTarget
from peftbench.recipe.arguments import load_recipe_from_arguments
from peftbench.record import RunRecord, read_record
from tests.helpers.paths import REPOSITORY
from tests.helpers.project import RECIPE
from tests.launch.test_run_suite import peftbench, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits memory on Linux only")
MIB = 2**20
TOO_LITTLE, ENOUGH = 120, 400
"""Budgets in MiB. The tensors of the run below need 124: 50 for weights and moments, 74 for activations and logits."""
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
    """Write a recipe of full fine-tuning with one micro-batch per step and rows of max_length, and return its path."""
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


def read_oom_record(project: Path) -> RunRecord:
    """Return the record of a run that ran out of memory, after checking that its outcome is complete."""
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


def run_out_of_memory(
    full: Path, project: Path, launch: Callable[..., subprocess.CompletedProcess[str]]
) -> tuple[RunRecord, list[str]]:
    """Return the record of a run under too small a budget, and the arguments of the suggested command."""
    done = launch("--config", str(full), f"budget.memory={TOO_LITTLE}MiB")
    assert done.returncode == 70, done.stderr
    assert "Traceback" not in done.stderr
    record = read_oom_record(project)
    assert record.outcome.rank is None
    assert record.outcome.estimated_peak_bytes is not None
    assert record.outcome.estimated_peak_bytes > TOO_LITTLE * MIB
    suggestion = record.outcome.suggestion
    assert suggestion is not None
    assert json.loads(done.stdout.splitlines()[-1])["suggestion"] == suggestion
    *_, command = done.stderr.split("peftbench train ")
    arguments = command.splitlines()[0].split()
    assert arguments[0] == "out/run/record.json"
    assert arguments[1:] == list(record.outcome.suggested_overrides)
    return record, arguments


@pytest.mark.slow
def test_plan_of_an_oom_suggestion_fits(
    full: Path,
    project: Path,
    launch: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The record has requested, in-use and estimated bytes, and the suggested overrides are planned to fit."""
    record, arguments = run_out_of_memory(full, project, launch)
    assert record.outcome.suggested_overrides
    monkeypatch.chdir(project)
    recipe = load_recipe_from_arguments("train", arguments, [])
    assert (recipe.train.global_batch_size, recipe.budget.memory_bytes) == (8, TOO_LITTLE * MIB)
    assert MemoryTarget(get_device_facts("cpu"), "cpu", TOO_LITTLE * MIB).plan(recipe).verdict == "fits"


@pytest.mark.slow
def test_oom_suggestion_fits(
    full: Path, project: Path, launch: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The suggested overrides run under the same budget."""
    _, arguments = run_out_of_memory(full, project, launch)
    repeated = launch(*arguments)
    assert repeated.returncode == 0, repeated.stderr
    assert read_record(project / "out" / "run" / "record.json").recipe["train"]["global_batch_size"] == 8


@pytest.mark.slow
def test_sufficient_budget(full: Path, launch: Callable[..., subprocess.CompletedProcess[str]], project: Path) -> None:
    """The run completes, and its peak memory is below the budget."""
    done = launch("--config", str(full), f"budget.memory={ENOUGH}MiB")
    assert done.returncode == 0, done.stderr
    memory = read_record(project / "out" / "run" / "record.json").memory["train"]
    assert memory.rss_bytes is not None
    assert memory.baseline_rss_bytes is not None
    assert TOO_LITTLE * MIB < memory.rss_bytes - memory.baseline_rss_bytes < ENOUGH * MIB


@pytest.mark.slow
def test_resident_memory_is_in_the_planned_range(
    full: Path, launch: Callable[..., subprocess.CompletedProcess[str]], project: Path, caches: dict[str, str]
) -> None:
    """Without a budget, the peak RSS of the whole process is between the plan's minimum and maximum."""
    planned = run(peftbench("estimate", str(full), "--device", "cpu", "--json"), project, caches)
    assert planned.returncode == 0, planned.stderr
    least, most = json.loads(planned.stdout)["resident_bytes"]
    done = launch("--config", str(full))
    assert done.returncode == 0, done.stderr
    peaks = [memory.rss_bytes for memory in read_record(project / "out" / "run" / "record.json").memory.values()]
    assert least < max(peak for peak in peaks if peak is not None) < most


@pytest.mark.slow
def test_suite_continues_after_oom(full: Path, project: Path, caches: dict[str, str]) -> None:
    """The report has a row with the estimated bytes of the run that ran out of memory, and the next run starts."""
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
    done = run(peftbench("run", "suite.yaml"), project, caches)
    assert done.returncode == 0, done.stderr
    assert f"run-memory={TOO_LITTLE}MiB: oom" in done.stderr
    assert f"run-memory={ENOUGH}MiB: ok" in done.stderr
    record = read_record(project / "out" / f"run-memory={TOO_LITTLE}MiB" / "record.json")
    assert record.outcome.estimated_peak_bytes is not None
    report = (project / "out" / "RESULTS.md").read_text(encoding="utf-8")
    assert re.search(rf"\| +{record.outcome.estimated_peak_bytes / MIB:,.0f} \|", report)
    assert "est. need (MiB)" in report
    assert f"in use {(record.outcome.in_use_bytes or 0) / MIB:,.1f} MiB" in report
    assert "is predicted to fit" in report


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("starved", ["1", *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in ("0", "01"))])
def test_oom_on_one_rank_ends_all(starved: str, full: Path, project: Path, caches: dict[str, str]) -> None:
    """All ranks end, one record has the rank, and no other files remain."""
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
        check=False,
    )
    assert done.returncode != 0
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["outcome"] == "oom", done.stderr
    assert [text for text in done.stdout.splitlines() if text.startswith("{")] == [done.stdout.splitlines()[-1]]
    assert str(read_oom_record(project).outcome.rank) in starved
    assert {path.name for path in (project / "out" / "run").iterdir()} == {".lock", "record.json", "status.json"}


@pytest.mark.slow
def test_auto_micro_batch_fits(
    full: Path, launch: Callable[..., subprocess.CompletedProcess[str]], project: Path
) -> None:
    """The largest micro-batch predicted to fit is used and noted; the recorded recipe keeps auto."""
    done = launch("--config", str(full), "budget.memory=150MiB", "train.micro_batch_size=auto")
    assert done.returncode == 0, done.stderr
    record = read_record(project / "out" / "run" / "record.json")
    assert record.recipe["train"]["micro_batch_size"] == "auto"
    assert record.engine is not None
    assert record.engine.micro_batch_size is not None
    assert 1 <= record.engine.micro_batch_size < 8
    assert record.engine.micro_batch_size * record.engine.gradient_accumulation_steps >= 8
    auto, note = record.notes
    assert "train.precision is fp32 (budget.memory needs a memory estimate" in auto
    assert note.startswith(f"train.micro_batch_size=auto resolved to {record.engine.micro_batch_size}, ")
    assert "150 MiB" in note


@pytest.mark.slow
def test_fit_verify_finds_the_limit(full: Path, project: Path, caches: dict[str, str]) -> None:
    """All sizes up to the reported one end as ok, and all larger ones run out of memory."""
    done = run(
        peftbench(
            "fit",
            "--config",
            full.name,
            "train.global_batch_size=64",
            "--device",
            "cpu",
            "--budget",
            "150MiB",
            "--techniques",
            "",
            "--verify",
            "--json",
        ),
        project,
        caches,
    )
    assert done.returncode == 0, done.stderr
    verification = json.loads(done.stdout)["verification"]
    sizes = sorted(map(int, verification["outcome_by_micro_batch_size"]))
    assert {
        verification["outcome_by_micro_batch_size"][str(size)]
        for size in sizes
        if size <= verification["largest_micro_batch_size"]
    } == {"ok"}
    assert {
        verification["outcome_by_micro_batch_size"][str(size)]
        for size in sizes
        if size > verification["largest_micro_batch_size"]
    } == {"oom"}
    assert verification["predicted_micro_batch_size"] <= verification["largest_micro_batch_size"]  # the prediction fits
    assert not (project / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["budget.memory=lots"], 13, "budget.memory='lots'"),
        (["budget.memory=900TiB"], 80, "budget.memory="),
        (["budget.memory=2MiB"], 80, "budget.memory="),
        (
            ["train.micro_batch_size=auto"],
            80,
            "budget.memory",
        ),
        (["train.micro_batch_size=many"], 13, "auto"),
    ],
)
def test_invalid_budget_is_refused(
    arguments: list[str],
    code: int,
    message: str,
    project: Path,
    launch: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Each error is one sentence with its exit code, and nothing is written."""
    done = launch("--config", "recipe.yaml", *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "out").exists()
