"""The comparison for other programs."""

from __future__ import annotations

import json
import re

import pytest

from peftbench.record import Outcome
from peftbench.report.tables.columns import COLUMNS
from peftbench.report.tables.export import json_table, latex_table
from tests.unit.report.records import record


def test_json_has_every_figure_and_what_it_means() -> None:
    """One object a run with each column's raw values, the recipe and where it ran; unknown is null."""
    found = json.loads(json_table([record("a", "lora", 10), record("b", "full", 1000)], ["A sentence."]))
    assert found["summary"] == ["A sentence."]
    assert set(found["columns"]) == {column.title for column in COLUMNS}
    assert [run["run"] for run in found["runs"]] == ["a", "b"]
    assert found["runs"][0]["trainable_parameters"] == 10
    assert found["runs"][0]["rougeL"] == 31.25
    assert found["runs"][0]["mfu"] is None
    assert found["runs"][0]["recipe"]["method"]["kind"] == "lora"


def test_json_is_json_of_a_diverged_run_too() -> None:
    """A loss that is no number is null: JSON knows no NaN, and a strict reader would refuse it."""
    text = json_table([record("a", "lora", 10, loss=float("nan"), outcome=Outcome(kind="diverged", step=2))], [])
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["runs"][0]["held_out_loss"] is None


def test_latex_is_a_table_of_booktabs() -> None:
    """As many cells in each row as the tabular has columns, between the rules of booktabs."""
    text = latex_table([record("a", "lora", 10), record("b", "full", 1000)])
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert columns is not None
    assert columns[1] == "l" + "r" * (len(columns[1]) - 2) + "l"
    rows = [line for line in text.splitlines() if line.rstrip().endswith("\\\\")]
    assert len(rows) == 3
    assert {row.count(" & ") + 1 for row in rows} == {len(columns[1])}
    assert [text.count(rule) for rule in ("\\toprule", "\\midrule", "\\bottomrule")] == [1, 1, 1]


def test_latex_escapes_what_it_would_take_for_its_own() -> None:
    """A run's name may hold what LaTeX reads as commands, comments or columns."""
    text = latex_table([record(r"a_b & 50 % of $x$ #1 {\input{x}}", "lora", 10)])
    assert r"a\_b \& 50 \% of \$x\$ \#1 \{" in text
    assert r"\input{x}" not in text
    assert "–" not in text


@pytest.mark.parametrize("name", ["[2cm] lora", "* lora"])
def test_latex_takes_no_name_for_an_option(name: str) -> None:
    r"""What follows ``\\`` or ``\midrule`` in brackets would be a length, and a star would be swallowed."""
    rows = latex_table([record(f"{name} 1", "lora", 10), record(f"{name} 2", "lora", 10)]).splitlines()
    assert [row.strip()[: len(name) + 4] for row in rows if name in row] == [f"{{}}{name} 1", f"{{}}{name} 2"]


def test_a_line_break_in_a_name_breaks_no_row() -> None:
    """A row of the tabular is a line."""
    text = latex_table([record("a\n\nb\x00", "lora", 10)])
    (row,) = [line for line in text.splitlines() if "a b" in line]
    assert row.rstrip().endswith("\\\\")
    assert "\x00" not in text
