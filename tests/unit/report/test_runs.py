"""Runs of one name in one report."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from peftbench.cli.report import load_records, print_report
from peftbench.record import RunRecord
from peftbench.report.page.content import build_page_data
from peftbench.report.runs import with_unique_names
from peftbench.report.tables.table import csv_table
from peftbench.report.writer import write_report
from tests.unit.report.records import record


def named(*runs: tuple[str, str, str]) -> dict[str, str]:
    """The names that runs of a path, a name and a kind get, by path."""
    records = {Path(path) / "record.json": record(name, kind, 1) for path, name, kind in runs}
    return {str(path.parent): one.name for path, one in with_unique_names(records).items()}


def test_a_name_that_repeats_gives_way_to_its_path() -> None:
    """Below what all folders lie in; another's name stays, and none is taken twice."""
    assert with_unique_names({}) == {}
    assert named(("r/a/x", "x", "lora"), ("r/b/x", "x", "lora"), ("r/b/y", "y", "lora")) == {
        "r/a/x": "a/x",
        "r/b/x": "b/x",
        "r/b/y": "y",
    }
    assert named(("r", "x", "lora"), ("r/x", "x", "lora")) == {"r": "r", "r/x": "r/x"}
    assert named(("r/a", "x", "lora"), ("r/b", "x", "lora"), ("r/c", "a", "lora")) == {
        "r/a": "a",
        "r/b": "b",
        "r/c": "c",
    }
    # What is shown is the name and the method.
    assert named(("r/a", "x", "lora"), ("r/b", "x (lora)", "lora")) == {"r/a": "a", "r/b": "b"}
    assert named(("r/a", "x", "lora"), ("r/b", "x", "full")) == {"r/a": "x", "r/b": "x"}


def two_suites(folder: Path) -> None:
    """Records of two runs of one name, with other losses."""
    for suite, losses in (("demo", (3.0, 2.0)), ("demo_seeds", (5.0, 4.0))):
        record("lora", "lora", 10, step_losses=losses).write(folder / suite / "lora")


def test_two_runs_of_one_name_are_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rows, two curves, two commands and two summaries, of the same names everywhere."""
    two_suites(tmp_path)
    names = ["demo/lora", "demo_seeds/lora"]
    records: dict[Path, RunRecord] = load_records(tmp_path, None, allow_empty=False)
    assert [row["run"] for row in csv.DictReader(io.StringIO(csv_table(list(records.values()))))] == names
    made = build_page_data(records, "t", [])
    (losses, *_) = made.loss_charts
    (points,) = losses.spec["datasets"].values()
    assert {(point["run"], point["loss"]) for point in points} == {
        (names[0], 3.0),
        (names[0], 2.0),
        (names[1], 5.0),
        (names[1], 4.0),
    }
    assert list(made.reproduce_commands) == names
    assert "demo_seeds/lora/record.json" in made.reproduce_commands[names[1]][0]
    assert list(made.examples[0].generated) == names
    print_report(write_report(records, tmp_path, "t"), "t")
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert [run["run"] for run in json.loads((tmp_path / "results.json").read_text())["runs"]] == names


def test_a_report_tells_apart_what_it_is_given(tmp_path: Path) -> None:
    """Records that were not read for it, as those of a suite that just ended, too."""
    records = {tmp_path / suite / "record.json": record("x", "lora", 10) for suite in ("a", "b")}
    assert [one.name for one in write_report(records, tmp_path, "t").records] == ["a", "b"]
