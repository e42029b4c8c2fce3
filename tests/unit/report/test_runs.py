"""Unique names for runs with equal names in one report."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from peftbench.cli.report_actions import load_records, print_report
from peftbench.record import RunRecord
from peftbench.report.page.content import build_page_data
from peftbench.report.runs import with_unique_names
from peftbench.report.tables.table import csv_table
from peftbench.report.writer import write_report
from tests.unit.report.records import build_record


def unique_names(*runs: tuple[str, str, str]) -> dict[str, str]:
    """Return the unique names of runs, which are given as path, name and method kind, by path."""
    records = {Path(path) / "record.json": build_record(name, kind, 1) for path, name, kind in runs}
    return {str(path.parent): run_record.name for path, run_record in with_unique_names(records).items()}


def test_duplicate_name_is_replaced_by_the_path() -> None:
    """Use the path below the common folder; keep unique names, and use no name twice."""
    assert with_unique_names({}) == {}
    assert unique_names(("r/a/x", "x", "lora"), ("r/b/x", "x", "lora"), ("r/b/y", "y", "lora")) == {
        "r/a/x": "a/x",
        "r/b/x": "b/x",
        "r/b/y": "y",
    }
    assert unique_names(("r", "x", "lora"), ("r/x", "x", "lora")) == {"r": "r", "r/x": "r/x"}
    assert unique_names(("r/a", "x", "lora"), ("r/b", "x", "lora"), ("r/c", "a", "lora")) == {
        "r/a": "a",
        "r/b": "b",
        "r/c": "c",
    }
    # A label consists of the name and the method.
    assert unique_names(("r/a", "x", "lora"), ("r/b", "x (lora)", "lora")) == {"r/a": "a", "r/b": "b"}
    assert unique_names(("r/a", "x", "lora"), ("r/b", "x", "full")) == {"r/a": "x", "r/b": "x"}


def write_two_suites(folder: Path) -> None:
    """Write two suites, each with a run named lora, with different losses."""
    for suite, losses in (("demo", (3.0, 2.0)), ("demo_seeds", (5.0, 4.0))):
        build_record("lora", "lora", 10, step_losses=losses).write(folder / suite / "lora")


def test_runs_with_equal_names_stay_separate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that table, loss chart, commands, examples, printed report and JSON use the same two names."""
    write_two_suites(tmp_path)
    names = ["demo/lora", "demo_seeds/lora"]
    records: dict[Path, RunRecord] = load_records(tmp_path, None, allow_empty=False)
    assert [row["run"] for row in csv.DictReader(io.StringIO(csv_table(list(records.values()))))] == names
    page_data = build_page_data(records, "t", [])
    (losses, *_) = page_data.loss_charts
    (points,) = losses.spec["datasets"].values()
    assert {(point["run"], point["loss"]) for point in points} == {
        (names[0], 3.0),
        (names[0], 2.0),
        (names[1], 5.0),
        (names[1], 4.0),
    }
    assert list(page_data.reproduce_commands) == names
    assert "demo_seeds/lora/record.json" in page_data.reproduce_commands[names[1]][0]
    assert list(page_data.examples[0].generated) == names
    print_report(write_report(records, tmp_path, "t"), "t")
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert [run["run"] for run in json.loads((tmp_path / "results.json").read_text())["runs"]] == names


def test_write_report_makes_names_unique(tmp_path: Path) -> None:
    """Pass records that were not read from a folder, e.g. those of a suite that just ended."""
    records = {tmp_path / suite / "record.json": build_record("x", "lora", 10) for suite in ("a", "b")}
    assert [run_record.name for run_record in write_report(records, tmp_path, "t").records] == ["a", "b"]
