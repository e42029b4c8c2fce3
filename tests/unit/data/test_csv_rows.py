"""CSV files: text as it is written, and the line and the fault of each broken record."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftbench.data.sources import Files
from peftbench.errors import DataError, EmptySplitError, MissingColumnError
from tests.helpers.summaries import load_summaries

HEADER = "id,article,summary\n"


def load(path: Path, content: str) -> list[dict[str, str]]:
    """Write a file, load it as the training split and return its rows."""
    path.write_bytes(content.encode())
    return list(load_summaries(Files(train=str(path), id="id")))


@pytest.mark.parametrize(
    "text",
    [
        "00500",
        "1.10",
        "1e5",
        "NA",
        "N/A",
        "None",
        "null",
        "NULL",
        "nan",
        "NaN",
        "-nan",
        "#N/A",
        "<NA>",
        "true",
        "1,5",
        "2020-01-01",
        "+1",
        "0x10",
        "1_000",
        "inf",
        " padded ",
        'a "term"',
        "two\nlines",
        "two\r\nlines",
        "é",
        "a\u2028b",
    ],
)
def test_text_is_not_interpreted(text: str, tmp_path: Path) -> None:
    """Whole columns of numbers, and of terms for missing values, are text as it is written."""
    quoted = '"' + text.replace('"', '""') + '"'
    rows = load(tmp_path / "rows.csv", HEADER + f"{quoted},{quoted},{quoted}\n" * 3)
    assert rows == [{"id": text, "article": text, "summary": text}] * 3


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_ending_is_read(end: str, tmp_path: Path) -> None:
    """The line endings of Unix, Windows and the old Mac; blank lines are skipped."""
    rows = load(tmp_path / "rows.csv", end.join(["", "id,article,summary", "1,a,b", "", '2,c,5" pipe']))
    assert [tuple(row.values()) for row in rows] == [("1", "a", "b"), ("2", "c", '5" pipe')]


def test_long_cell_is_read(tmp_path: Path) -> None:
    """The limit of the csv module, 131072 characters, does not apply, and it is the same afterwards."""
    import csv

    before = csv.field_size_limit()
    assert load(tmp_path / "rows.csv", HEADER + f"1,{'a' * 200_000},s\n")[0]["article"] == "a" * 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("records", "fault"),
    [
        ('1,a,b\n2,"c,d\n3,e,f\n', "the quote that opens in line 3 is never closed"),
        ('1,a,b\n2,"c\nd",e\n3,"f,g\n', "the quote that opens in line 5 is never closed"),
        ('1,a,b\n2,"c\nd","e\n', "the quote that opens in line 4 is never closed"),
        ('1,a,b\n2,"c,d\n3,"e",f\n', "the quote that opens in line 3 is closed in line 4, before its value ends"),
        ('1,"a"x,b\n', "line 2 has text after the quote that closes a value"),
        ('1,"a \\"b\\" c",d\n', "line 2 has text after the quote that closes a value"),
        ("1,a,b\n2,c,d,e\n", "line 3 has 4 values, and the header has 3 columns; put double quotes around a value"),
        ("1,a,b\n2,c\n", "line 3 has 2 values, and the header has 3 columns; correct that line"),
        ("1,a,b\n2\n", "line 3 has 1 value, and the header has 3 columns"),
        ('1,"a\nb",c\n2,d\n', "line 4 has 2 values, and the header has 3 columns"),
        ("1,a,b\0\n", "line 2 has a NUL byte"),
    ],
)
def test_broken_record_is_named_with_its_line(records: str, fault: str, tmp_path: Path) -> None:
    """A quote is named by the line where it opens, a record by its first line."""
    with pytest.raises(DataError) as error:
        load(tmp_path / "rows.csv", HEADER + records)
    assert f"rows.csv cannot be read as csv: {fault}" in str(error.value)


@pytest.mark.parametrize(
    ("content", "kind", "fault"),
    [
        ("id,article,summary,summary\n1,a,b,c\n", DataError, "has several columns 'summary'; give each"),
        (",,\n1,a,b\n", DataError, "line 1 has no column names"),
        ("1,a,b\n", MissingColumnError, "has no column 'id'; allowed: 1, a, b"),
        ("id;article;summary\n1;a;b\n", MissingColumnError, "'id': its values are separated by semicolons"),
        ("id\tarticle\tsummary\n1\ta\tb\n", MissingColumnError, "its values are separated by tabs"),
        ("id,article,sumary\n1,a,b\n", MissingColumnError, "has no column 'summary'; did you mean 'sumary'?"),
        ('id,article,"sum\nmary"\n1,a,b\n', MissingColumnError, "did you mean 'sum\\\\nmary'?"),
        (HEADER, EmptySplitError, "has no examples"),
        ("\n\n", EmptySplitError, "has no examples"),
        (HEADER + "1,a,\n", DataError, "example 0 (line 2) of the train split"),
        (HEADER + '1,a,""\n', DataError, "has no summary; add it or remove the row"),
        (HEADER + "1,a, \n", DataError, "has no summary"),
        (HEADER + ",a,b\n", DataError, "has no id"),
    ],
)
def test_unusable_header_or_cell_is_refused(content: str, kind: type[DataError], fault: str, tmp_path: Path) -> None:
    """The message has the fault and what to do."""
    with pytest.raises(kind) as error:
        load(tmp_path / "rows.csv", content)
    assert fault in str(error.value)
    assert type(error.value) is kind


def test_unused_columns_may_have_the_same_name_or_none(tmp_path: Path) -> None:
    """An index column without a name is what pandas writes."""
    rows = load(tmp_path / "rows.csv", ",id,article,summary,x,x\n0,1,a,b,,\n")
    assert rows == [{"id": "1", "article": "a", "summary": "b"}]
