"""Parquet files: text of every Arrow type, bytes decoded as UTF-8, and other types refused."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from peftbench.data.sources import Files
from peftbench.errors import DataError
from tests.helpers.summaries import load_summaries

TEXT = ["é one", "None"]


def load(path: Path, columns: dict[str, pyarrow.Array], id_column: str | None = None) -> list[dict[str, str]]:
    """Write a file, load it as the training split and return its rows."""
    parquet.write_table(pyarrow.table(columns), path)
    return list(load_summaries(Files(train=str(path), id=id_column)))


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"])
def test_text_and_bytes_give_the_same_text(kind: str, tmp_path: Path) -> None:
    """Bytes are decoded as UTF-8."""
    column = pyarrow.array(TEXT).cast(getattr(pyarrow, kind)())
    rows = load(tmp_path / "rows.parquet", {"article": column, "summary": column, "key": column}, "key")
    assert rows == [{"id": text, "article": text, "summary": text} for text in TEXT]


def test_categories_are_text(tmp_path: Path) -> None:
    """Such a column is what pandas writes for a category."""
    column = pyarrow.array(TEXT).dictionary_encode()
    assert [row["summary"] for row in load(tmp_path / "rows.parquet", {"article": column, "summary": column})] == TEXT


@pytest.mark.parametrize("declares_text", [True, False])
def test_bytes_that_are_not_utf8_are_refused_with_their_row(declares_text: bool, tmp_path: Path) -> None:
    """This holds in a column of bytes, and in one of text, which Parquet does not check."""
    column = pyarrow.array([b"ok", b"a\xff"])
    if declares_text:
        column = pyarrow.Array.from_buffers(pyarrow.string(), 2, column.buffers())
    with pytest.raises(DataError, match=r"example 1 of .* has bytes that are not UTF-8 .* in column 'summary'"):
        load(tmp_path / "rows.parquet", {"article": pyarrow.array(TEXT), "summary": column})


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1.5, float("nan")], "double"),
        ([1, 2], "int64"),
        ([True, False], "bool"),
        ([["a"], ["b"]], "list<element: string>"),
        ([{"text": "a"}, {"text": "b"}], "struct<text: string>"),
    ],
)
def test_column_that_is_not_text_is_refused_with_its_type(values: list[object], kind: str, tmp_path: Path) -> None:
    """No number, list or structure is converted to text."""
    with pytest.raises(DataError) as error:
        load(tmp_path / "rows.parquet", {"article": pyarrow.array(TEXT), "summary": pyarrow.array(values)})
    assert f"has type {kind}, which is not text; convert it to text" in str(error.value)


@pytest.mark.parametrize("kind", ["int8", "uint64"])
def test_id_may_be_an_integer_and_not_a_float(kind: str, tmp_path: Path) -> None:
    """A float is refused: its digits depend on how it is printed."""
    columns = {"article": pyarrow.array(TEXT), "summary": pyarrow.array(TEXT)}
    ids = pyarrow.array([7, 8], getattr(pyarrow, kind)())
    assert [row["id"] for row in load(tmp_path / "rows.parquet", columns | {"key": ids}, "key")] == ["7", "8"]
    with pytest.raises(DataError, match=r"column 'key' .* has type float"):
        load(tmp_path / "rows.parquet", columns | {"key": ids.cast(pyarrow.float32())}, "key")


@pytest.mark.parametrize("values", [["a", None], ["a", ""], ["a", " \n"], [None, None]])
def test_missing_cell_is_refused_with_its_row(values: list[str | None], tmp_path: Path) -> None:
    """Null and empty text are missing, also in a column without any value."""
    with pytest.raises(
        DataError, match=f"example {values.index(None) if values[0] is None else 1} of .* has no summary"
    ):
        load(tmp_path / "rows.parquet", {"article": pyarrow.array(TEXT), "summary": pyarrow.array(values)})


def test_repeated_column_is_refused(tmp_path: Path) -> None:
    """Two used columns of the same name are ambiguous."""
    table = pyarrow.Table.from_arrays([pyarrow.array(TEXT)] * 3, names=["article", "summary", "summary"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="has several columns 'summary'"):
        load_summaries(Files(train=str(tmp_path / "rows.parquet")))


def test_name_with_a_dot_is_one_column(tmp_path: Path) -> None:
    """It does not select a field of a structure."""
    columns = {"a.b": pyarrow.array(TEXT), "a": pyarrow.array([{"b": "x"}] * 2), "summary": pyarrow.array(TEXT)}
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    rows = load_summaries(Files(train=str(tmp_path / "rows.parquet")), article="a.b")
    assert list(rows["article"]) == TEXT


@pytest.mark.parametrize("content", [b"PAR1 not a footer PAR1", b"text"])
def test_file_that_is_not_parquet_is_refused(content: bytes, tmp_path: Path) -> None:
    """The message has the file."""
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read as parquet: it is not a valid Parquet file"):
        load_summaries(Files(train=str(tmp_path / "rows.parquet")))
