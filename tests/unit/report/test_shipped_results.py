"""The results in README and docs: generated from committed records of the shipped recipes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from peftbench.cli.app import app
from peftbench.record import RECORD_FILE, RunRecord, read_records, train_peak_bytes
from peftbench.report.tables.table import insert_table
from peftbench.suite.expand import expand
from peftbench.training.auto_settings import resolve_task
from tests.helpers.paths import REPOSITORY

REPORT_COMMANDS = re.findall(
    r"peftbench report (\S+) --update-file (\S+) --marker (\S+)(?: --group-by (\S+))?",
    (REPOSITORY / "Makefile").read_text(encoding="utf-8"),
)
ESTIMATE_COMMANDS = re.findall(
    r"peftbench estimate (.+) --update-file (\S+) --marker (\S+)", (REPOSITORY / "Makefile").read_text(encoding="utf-8")
)
SIMULATION_COMMANDS = re.findall(
    r"python (benchmarks/\S+) (\S+) --update-file (docs/\S+) --marker (\S+)",
    (REPOSITORY / "Makefile").read_text(encoding="utf-8"),
)
SUITES = {
    "demo": "demo/suite.yaml",
    "demo_budget": "demo/budget.yaml",
    "demo_libraries": "demo/libraries.yaml",
    "demo_rates": "demo/rates.yaml",
    "demo_seeds": "demo/seeds.yaml",
    "methods": "methods/suite.yaml",
}
"""Suite by folder of its records."""


def test_make_readme_fills_every_block() -> None:
    """Compare the blocks of the Markdown files with those that the Makefile fills."""
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")]
    blocks = {
        (str(page.relative_to(REPOSITORY)), block)
        for page in pages
        for block in re.findall(r"<!-- report:(\S+) -->", page.read_text(encoding="utf-8"))
    }
    assert len(blocks) >= 5
    filled = {(file, block) for _, file, block, _ in REPORT_COMMANDS} | {
        (file, block) for _, file, block in ESTIMATE_COMMANDS
    }
    filled |= {(file, block) for _, _, file, block in SIMULATION_COMMANDS}
    assert blocks == filled | {("README.md", "picture")}


@pytest.mark.parametrize(
    ("arguments", "file", "block"),
    [pytest.param(*plan, id=plan[2], marks=[pytest.mark.slow] * ("--suite" in plan[0])) for plan in ESTIMATE_COMMANDS],
)
def test_estimate_block_is_current(
    arguments: str, file: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generate the block again with the estimator, and compare the file with the committed one."""
    page = Path(shutil.copy(REPOSITORY / file, tmp_path))
    monkeypatch.chdir(REPOSITORY)
    result = CliRunner().invoke(app, ["estimate", *arguments.split(), "--update-file", str(page), "--marker", block])
    assert result.exit_code == 0, result.output
    assert page.read_text(encoding="utf-8") == (REPOSITORY / file).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("script", "records", "file", "block"), SIMULATION_COMMANDS)
def test_simulation_block_is_current(script: str, records: str, file: str, block: str, tmp_path: Path) -> None:
    """Run the simulation again, and compare the file with the committed one."""
    page = Path(shutil.copy(REPOSITORY / file, tmp_path))
    command = [sys.executable, script, records, "--update-file", str(page), "--marker", block]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    assert page.read_text(encoding="utf-8") == (REPOSITORY / file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("folder", "file", "block", "group_by"), REPORT_COMMANDS, ids=[line[2] for line in REPORT_COMMANDS]
)
def test_report_block_matches_its_records(folder: str, file: str, block: str, group_by: str, tmp_path: Path) -> None:
    """Generate the block again from its records: no number was typed, and none is outdated."""
    page = Path(shutil.copy(REPOSITORY / file, tmp_path))
    insert_table(read_records(REPOSITORY / folder), page, block, group_by or None)
    assert page.read_text(encoding="utf-8") == (REPOSITORY / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SUITES)
def test_records_match_the_shipped_suite(name: str) -> None:
    """Check that each run of the suite has a record of the current recipe, with its outcome, from a clean checkout."""
    records = {record.name: record for record in read_records(REPOSITORY / "docs" / "results" / name)}
    recipes = {recipe.name: recipe for recipe in expand(REPOSITORY / "recipes" / SUITES[name])}
    assert set(records) == set(recipes)
    for run_name, record in records.items():
        recipe, _ = resolve_task(recipes[run_name])
        assert find_changed_keys(record.recipe, recipe.model_dump(mode="json")) == []
        assert record.outcome.kind == ("oom" if (name, run_name) == ("demo_budget", "full") else "ok")
        assert record.git_commit
        assert "+changes" not in record.git_commit


def find_changed_keys(recorded: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the keys of a record whose value differs in the current recipe; newer keys are not in the record.

    A record has the value that auto resolved to.
    """
    changed_keys = []
    for key, value in recorded.items():
        if isinstance(value, dict):
            changed_keys += find_changed_keys(value, current[key], f"{prefix}{key}.")
        elif value != current[key] and current[key] != "auto":
            changed_keys.append(f"{prefix}{key}")
    return changed_keys


def test_full_fine_tuning_beats_the_untrained_base_in_the_demo() -> None:
    """Check that full fine-tuning has a clearly lower held-out loss and an entirely higher ROUGE-L interval."""
    records = {r.name: r for r in read_records(REPOSITORY / "docs" / "results" / "demo")}
    full, base = read_loss_and_rouge(records["full"]), read_loss_and_rouge(records["zero_shot"])
    assert full[0] < base[0] - 0.2
    assert full[1][0] > base[1][1]


def test_full_fine_tuning_exceeds_the_budget_of_the_demo() -> None:
    """Check that full fine-tuning needs more than the budget and suggests what fits, and that LoRA needs the least."""
    records = {r.name: r for r in read_records(REPOSITORY / "docs" / "results" / "demo_budget")}
    budget = 110 * 2**20
    outcome = records["full"].outcome
    assert outcome.requested_bytes is not None
    assert outcome.in_use_bytes is not None
    freed_blocks = 8 * 2**20  # of the C library, which the budget counts and in_use_bytes does not
    assert outcome.in_use_bytes <= budget < outcome.in_use_bytes + outcome.requested_bytes + freed_blocks
    assert outcome.suggestion is not None
    assert "is predicted to fit" in outcome.suggestion
    peaks = {name: train_peak_bytes(record) for name, record in records.items()}
    assert 0 < (peaks["lora"] or 0) < min(peaks["full_in_8bit"] or 0, peaks["full"] or 0)


def test_order_of_methods_by_loss_is_the_same_for_all_seeds() -> None:
    """Sort the four methods by held-out loss for each seed; all are better than the untrained base."""
    losses: dict[int, dict[str, float]] = {}
    for record in read_records(REPOSITORY / "docs" / "results" / "demo_seeds"):
        losses.setdefault(record.recipe["train"]["seed"], {})[record.recipe["method"]["kind"]] = read_loss_and_rouge(
            record
        )[0]
    orders = {tuple(sorted(by_method, key=by_method.__getitem__)) for by_method in losses.values()}
    assert len(losses) == 3
    assert orders == {("full", "lora", "prompt_tuning", "last_layer")}
    base = {r.name: r for r in read_records(REPOSITORY / "docs" / "results" / "demo")}["zero_shot"]
    assert max(max(by_method.values()) for by_method in losses.values()) < read_loss_and_rouge(base)[0]


def read_loss_and_rouge(record: RunRecord) -> tuple[float, tuple[float, float]]:
    """Return the held-out loss and the ends of the ROUGE-L interval."""
    assert record.quality is not None
    assert record.quality.loss is not None
    score = record.quality.metrics["rougeL"].interval
    return record.quality.loss, (score.low, score.high)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "docs" / "results").rglob(RECORD_FILE)), ids=lambda p: p.parent.name
)
def test_published_record_has_no_absolute_path(path: Path) -> None:
    """Search the JSON for values that start with a slash."""
    assert not re.search(r'": "/', path.read_text(encoding="utf-8"))
