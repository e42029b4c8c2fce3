"""The figures in README and docs: made from the committed records, by runs of the shipped recipes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftbench.record import RECORD_FILE, RunRecord, read_records, train_peak_bytes
from peftbench.report.tables.table import insert_table
from peftbench.suite.expand import expand
from tests.helpers.paths import REPOSITORY

LINES = re.findall(
    r"peftbench report (\S+) --update-file (\S+) --marker (\S+)(?: --group-by (\S+))?",
    (REPOSITORY / "Makefile").read_text(encoding="utf-8"),
)
PLANS = re.findall(
    r"peftbench estimate (.+) --update-file (\S+) --marker (\S+)", (REPOSITORY / "Makefile").read_text(encoding="utf-8")
)
SUITES = {"demo": "suite.yaml", "demo_budget": "budget.yaml", "demo_seeds": "seeds.yaml", "demo_rates": "rates.yaml"}


def test_every_block_is_made_by_make_readme() -> None:
    """The blocks in the pages are those that the Makefile fills, and there are some."""
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")]
    blocks = {
        (str(page.relative_to(REPOSITORY)), block)
        for page in pages
        for block in re.findall(r"<!-- report:(\S+) -->", page.read_text(encoding="utf-8"))
    }
    assert len(blocks) >= 5
    made = {(file, block) for _, file, block, _ in LINES} | {(file, block) for _, file, block in PLANS}
    assert blocks == made | {("README.md", "picture")}


@pytest.mark.parametrize(
    ("arguments", "file", "block"),
    [pytest.param(*plan, id=plan[2], marks=[pytest.mark.slow] * ("--suite" in plan[0])) for plan in PLANS],
)
def test_a_page_shows_what_is_planned_now(arguments: str, file: str, block: str, tmp_path: Path) -> None:
    """Making a block again by the estimator changes nothing."""
    page = Path(shutil.copy(REPOSITORY / file, tmp_path))
    command = [
        "-c",
        "from peftbench.cli.app import main; main()",
        "estimate",
        *arguments.split(),
        "--update-file",
        str(page),
    ]
    subprocess.run([sys.executable, *command, "--marker", block], check=True, cwd=REPOSITORY, timeout=280)
    assert page.read_text(encoding="utf-8") == (REPOSITORY / file).read_text(encoding="utf-8")


@pytest.mark.parametrize(("folder", "file", "block", "by"), LINES, ids=[line[2] for line in LINES])
def test_a_page_shows_what_its_records_say(folder: str, file: str, block: str, by: str, tmp_path: Path) -> None:
    """Making a block again from its records changes nothing: no figure was typed, and none is old."""
    page = Path(shutil.copy(REPOSITORY / file, tmp_path))
    insert_table(read_records(REPOSITORY / folder), page, block, by or None)
    assert page.read_text(encoding="utf-8") == (REPOSITORY / file).read_text(encoding="utf-8")


PADDED = {"demo_rates"}
"""Suites whose records are of before rows were packed, as their page says."""


@pytest.mark.parametrize("name", SUITES)
def test_the_records_are_of_the_shipped_suite(name: str) -> None:
    """Every run of the suite has its record, of what the recipe asks for now, ended well, from a clean checkout."""
    records = {record.name: record for record in read_records(REPOSITORY / "docs" / "results" / name)}
    recipes = {recipe.name: recipe for recipe in expand(REPOSITORY / "recipes" / "demo" / SUITES[name])}
    assert set(records) == set(recipes)
    for run, record in records.items():
        assert unlike(record.recipe, recipes[run].model_dump(mode="json")) == []
        assert record.recipe["data"]["padding"] == ("longest" if name in PADDED else "auto")
        assert record.outcome.kind == ("oom" if (name, run) == ("demo_budget", "full") else "ok")
        assert record.git_commit
        assert "+changes" not in record.git_commit


def unlike(recorded: dict[str, Any], now: dict[str, Any], place: str = "") -> list[str]:
    """Knobs of a record that the recipe of today sets otherwise; ones that came later are not in the record.

    Rows were padded to the longest before they were packed, which changes no loss beyond rounding.
    """
    found = []
    for key, value in recorded.items():
        if isinstance(value, dict):
            found += unlike(value, now[key], f"{place}{key}.")
        elif value != now[key] and (place + key, value, now[key]) != ("data.padding", "longest", "auto"):
            found.append(f"{place}{key}")
    return found


def test_the_demo_means_something() -> None:
    """Full fine-tuning clearly beats the untrained base on held-out loss and, intervals apart, on ROUGE-L."""
    records = {r.name: r for r in read_records(REPOSITORY / "docs" / "results" / "demo")}
    full, base = quality(records["full"]), quality(records["zero_shot"])
    assert full[0] < base[0] - 0.2
    assert full[1][0] > base[1][1]


def test_the_budget_tells_its_story() -> None:
    """Full fine-tuning would have needed more than there was, and says what would fit; the others stay inside."""
    records = {r.name: r for r in read_records(REPOSITORY / "docs" / "results" / "demo_budget")}
    budget = 112 * 2**20
    outcome = records["full"].outcome
    assert outcome.requested_bytes is not None
    assert outcome.in_use_bytes is not None
    assert outcome.in_use_bytes <= budget < outcome.in_use_bytes + outcome.requested_bytes + 2**20
    assert outcome.suggestion is not None
    assert "is predicted to fit" in outcome.suggestion
    peaks = {name: train_peak_bytes(record) for name, record in records.items()}
    assert 0 < (peaks["lora"] or 0) < min(peaks["full_in_8bit"] or 0, peaks["full"] or 0)


def test_the_order_of_methods_holds_over_seeds() -> None:
    """By held-out loss the four methods come in one order, whatever the seed, and all before the untrained base."""
    losses: dict[int, dict[str, float]] = {}
    for record in read_records(REPOSITORY / "docs" / "results" / "demo_seeds"):
        losses.setdefault(record.recipe["train"]["seed"], {})[record.recipe["method"]["kind"]] = quality(record)[0]
    orders = {tuple(sorted(by_method, key=by_method.__getitem__)) for by_method in losses.values()}
    assert len(losses) == 3
    assert orders == {("full", "lora", "prompt_tuning", "last_layer")}
    base = {r.name: r for r in read_records(REPOSITORY / "docs" / "results" / "demo")}["zero_shot"]
    assert max(max(by_method.values()) for by_method in losses.values()) < quality(base)[0]


def quality(record: RunRecord) -> tuple[float, tuple[float, float]]:
    """Loss, and the ends of ROUGE-L's interval."""
    assert record.quality is not None
    assert record.quality.loss is not None
    assert record.quality.rouge is not None
    score = record.quality.rouge["rougeL"]
    return record.quality.loss, (score.low, score.high)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "docs" / "results").rglob(RECORD_FILE)), ids=lambda p: p.parent.name
)
def test_no_record_names_a_place_on_the_machine_it_ran_on(path: Path) -> None:
    """Records that are published hold no absolute path."""
    assert not re.search(r'": "/', path.read_text(encoding="utf-8"))
