"""The fault of a data file that cannot be read: its line, in plain English."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftbench.data.file_errors import explain_unreadable_file

GOOD = '{"article": "a", "summary": "s"}\n'


@pytest.mark.parametrize(
    ("kind", "text", "fault"),
    [
        ("json", GOOD * 29 + '{"article": "a",, "summary": "s"}\n', "line 30 is not valid JSON: "),
        ("json", GOOD + "[1, 2]\n", "line 2 is not a JSON object"),
        (
            "json",
            GOOD + "\n" + '{"article": 5, "summary": "s"}\n',
            "column 'article' is str in line 1 and number in line 3",
        ),
        ("csv", "article,summary\na,b\na,b,c\n", "line 3 has 3 values, and the header has 2 columns"),
        ("parquet", "text", "it is not a valid Parquet file"),
    ],
)
def test_fault_names_the_line(kind: str, text: str, fault: str, tmp_path: Path) -> None:
    """The message is not that of the library."""
    path = tmp_path / "rows"
    path.write_text(text, encoding="utf-8")
    assert explain_unreadable_file(path, kind).startswith(fault)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    """The position of the first such byte is given."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b"\xff\n")
    assert explain_unreadable_file(path, "json") == f"byte {len(GOOD)} is not UTF-8"
