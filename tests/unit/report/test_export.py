"""Export of the comparison as JSON and LaTeX."""

from __future__ import annotations

import json
import re

import pytest

from peftbench.record import Outcome
from peftbench.report.tables.columns import build_columns
from peftbench.report.tables.export import json_table, latex_table
from tests.unit.report.records import build_record


def test_json_has_every_metric_and_its_description() -> None:
    """Write one object per run with each column's raw values and the recipe; an unknown value is null."""
    records = [build_record("a", "lora", 10), build_record("b", "full", 1000)]
    table = json.loads(json_table(records, ["A sentence."]))
    assert table["summary"] == ["A sentence."]
    assert set(table["columns"]) == {column.title for column in build_columns(records)}
    assert [run["run"] for run in table["runs"]] == ["a", "b"]
    assert table["runs"][0]["trainable_parameters"] == 10
    assert table["runs"][0]["rougeL"] == 31.25
    assert table["runs"][0]["mfu"] is None
    assert table["runs"][0]["recipe"]["method"]["kind"] == "lora"


def test_json_of_a_diverged_run_has_no_nan() -> None:
    """Write a NaN loss as null, because JSON has no NaN and strict parsers refuse it."""
    text = json_table([build_record("a", "lora", 10, loss=float("nan"), outcome=Outcome(kind="diverged", step=2))], [])
    table = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not valid JSON"))
    assert table["runs"][0]["held_out_loss"] is None


def test_latex_is_a_booktabs_table() -> None:
    """Write one cell per column of the tabular in each row, between the rules of booktabs."""
    text = latex_table([build_record("a", "lora", 10), build_record("b", "full", 1000)])
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert columns is not None
    assert columns[1] == "l" + "r" * (len(columns[1]) - 2) + "l"
    rows = [line for line in text.splitlines() if line.rstrip().endswith("\\\\")]
    assert len(rows) == 3
    assert {row.count(" & ") + 1 for row in rows} == {len(columns[1])}
    assert [text.count(rule) for rule in ("\\toprule", "\\midrule", "\\bottomrule")] == [1, 1, 1]


def test_latex_escapes_special_characters() -> None:
    """Escape what LaTeX would read as commands, comments or columns in a run's name."""
    text = latex_table([build_record(r"a_b & 50 % of $x$ #1 {\input{x}}", "lora", 10)])
    assert r"a\_b \& 50 \% of \$x\$ \#1 \{" in text
    assert r"\input{x}" not in text
    assert "–" not in text


@pytest.mark.parametrize("name", ["[2cm] lora", "* lora"])
def test_latex_name_is_not_read_as_an_argument(name: str) -> None:
    r"""Check that braces precede a name in brackets or with a star: after ``\\`` LaTeX reads these as arguments."""
    rows = latex_table([build_record(f"{name} 1", "lora", 10), build_record(f"{name} 2", "lora", 10)]).splitlines()
    assert [row.strip()[: len(name) + 4] for row in rows if name in row] == [f"{{}}{name} 1", f"{{}}{name} 2"]


def test_latex_row_of_a_name_with_line_break_is_one_line() -> None:
    """Replace line breaks and control characters in the name."""
    text = latex_table([build_record("a\n\nb\x00", "lora", 10)])
    (row,) = [line for line in text.splitlines() if "a b" in line]
    assert row.rstrip().endswith("\\\\")
    assert "\x00" not in text
