"""Columns with lists and objects: the same values from every format, and the faults of cells."""

from __future__ import annotations

import csv
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from peftbench.data.hub import Hub
from peftbench.data.readers.rows import Columns
from peftbench.data.sources import Files
from peftbench.errors import DataError
from peftbench.tasks.chat import Chat
from peftbench.tasks.choices import Choices
from tests.helpers.conversations import assistant, user

COLUMNS = Columns({"value": "value"}, structured=frozenset({"value"}))
CONVERSATION = [user('Café, "5"\n{a}'), assistant("日本 🙂")]


def write_json_lines(path: Path, values: list[Any]) -> str:
    """Write a file with one value in each row, and return its name."""
    lines = [json.dumps({"value": value, "other": 1}, ensure_ascii=False) + "\n" for value in values]
    path.with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8")
    return str(path.with_suffix(".jsonl"))


def write_csv(path: Path, values: list[Any]) -> str:
    """Write a file whose cells are JSON or text, and return its name."""
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["value", "other"])
        writer.writerows([[value if isinstance(value, str) else json.dumps(value), 1] for value in values])
    return str(path.with_suffix(".csv"))


def write_parquet(path: Path, values: list[Any]) -> str:
    """Write a file with a column of the values' type, and return its name."""
    parquet.write_table(pyarrow.table({"value": values, "other": [1] * len(values)}), path.with_suffix(".parquet"))
    return str(path.with_suffix(".parquet"))


Write = Callable[[Path, list[Any]], str]
WRITERS: list[Write] = [write_json_lines, write_csv, write_parquet]


def load(name: str, columns: Columns = COLUMNS) -> list[dict[str, str]]:
    """Return the examples of a file."""
    return [dict(row) for row in Files(train=name).load("train", columns)]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "values",
    [
        [CONVERSATION, CONVERSATION[:1]],
        [["a", "b"], ["c"]],
        [[[1, 2], []], [[3]]],
        [[1.5, -0.25], [1e300]],
        [[True, False], []],
        [["a", None], [None]],
        [[{"role": "user", "content": "a", "weight": None}], [{"role": "user", "content": None, "weight": 2}]],
    ],
    ids=["messages", "texts", "lists", "numbers", "booleans", "nulls", "null fields"],
)
def test_every_format_gives_the_same_structures(values: list[Any], write: Write, tmp_path: Path) -> None:
    """A cell is stored as JSON, with its characters as they are."""
    rows = load(write(tmp_path / "rows", values))
    assert [json.loads(row["value"]) for row in rows] == values
    assert [row["value"] for row in rows] == [json.dumps(value, ensure_ascii=False) for value in values]
    assert [row["id"] for row in rows] == [str(index) for index in range(len(values))]


@pytest.mark.parametrize("write", WRITERS)
def test_structured_column_may_hold_text(write: Write, tmp_path: Path) -> None:
    """Text is not parsed, whatever it looks like, except a list or an object in a CSV file."""
    texts = ["blue", "1", "null", '"a"', "[1, 2", "{a}", " x "]
    assert [json.loads(row["value"]) for row in load(write(tmp_path / "rows", texts))] == texts


def test_text_that_is_a_list_is_parsed_in_a_csv_file_only(tmp_path: Path) -> None:
    """A CSV file has no other way to write a list."""
    texts = [' ["a"] ', '{"b": 1}']
    assert [json.loads(row["value"]) for row in load(write_csv(tmp_path / "rows", texts))] == [["a"], {"b": 1}]
    for write in (write_json_lines, write_parquet):
        assert [json.loads(row["value"]) for row in load(write(tmp_path / "rows", texts))] == texts


@pytest.mark.parametrize("write", [write_json_lines, write_parquet])
def test_numbers_keep_their_value(write: Write, tmp_path: Path) -> None:
    """An integer stays an integer, as an answer that is an index needs."""
    assert [row["value"] for row in load(write(tmp_path / "rows", [0, 3, 2**62]))] == ["0", "3", str(2**62)]
    assert [row["value"] for row in load(write(tmp_path / "more", [0.5, 2.0]))] == ["0.5", "2.0"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_huge_integer_does_not_stop_the_reader(suffix: str, tmp_path: Path) -> None:
    """Python converts no integer of more than 4300 digits, so it is text."""
    digits = "9" * 5000
    value = f'{{"value": [{digits}]}}\n' if suffix == ".jsonl" else f"value\n[{digits}]\n"
    (tmp_path / f"rows{suffix}").write_text(value, encoding="utf-8")
    assert json.loads(load(str(tmp_path / f"rows{suffix}"))[0]["value"]) == [digits]


@pytest.mark.parametrize("write", WRITERS)
def test_empty_cell_is_refused(write: Write, tmp_path: Path) -> None:
    """Null in JSON and Parquet, an empty cell in CSV."""
    values = [["a"], "" if write is write_csv else None]
    with pytest.raises(DataError, match=r"example 1 .*of the train split of .* has no value; add it or remove the row"):
        load(write(tmp_path / "rows", values))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (
            '[{"role": "user", "role": "tool"}]',
            "the name 'role' twice in one object in column 'value'; correct",
        ),
        (r'[{"a": "x\ud800"}]', r"\ud800, which is half of a character, in column 'value'; write both halves"),
        (r'[{"\udc00": 1}]', r"\udc00, which is half of a character, in column 'value'; write both halves"),
    ],
    ids=["repeated name", "surrogate", "surrogate in a name"],
)
def test_fault_inside_a_structure_is_refused(value: str, fault: str, suffix: str, tmp_path: Path) -> None:
    """The error has the line, the fault and the column; no value is dropped silently."""
    path = tmp_path / f"rows{suffix}"
    with path.open("w", encoding="utf-8", newline="") as file:
        if suffix == ".csv":
            csv.writer(file).writerows([["value"], ['["a"]'], [value]])
        else:
            file.write(f'{{"value": ["a"]}}\n{{"value": {value}}}\n')
    with pytest.raises(DataError) as error:
        load(str(path))
    line = 3 if suffix == ".csv" else 2
    assert f"example 1 (line {line}) of the train split of {path} has {fault}" in str(error.value)


def test_whole_character_in_two_escapes_is_read(tmp_path: Path) -> None:
    """Both halves together are one character."""
    (tmp_path / "rows.jsonl").write_text(r'{"value": ["\ud83d\ude42"]}' + "\n", encoding="utf-8")
    assert json.loads(load(str(tmp_path / "rows.jsonl"))[0]["value"]) == ["🙂"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [([[b"a"]], "list<element: binary>"), ([[datetime.date(2026, 1, 2)]], "list<element: date32[day]>")],
)
def test_value_that_json_lacks_is_refused_with_its_type(values: list[Any], kind: str, tmp_path: Path) -> None:
    """Bytes and dates in a Parquet file."""
    with pytest.raises(DataError) as error:
        load(write_parquet(tmp_path / "rows", values))
    fault = f"has a value of type {kind}, which JSON does not have, in column 'value'; convert it to text"
    assert fault in str(error.value)


@pytest.mark.parametrize("write", WRITERS)
def test_conversations_and_questions_are_read_from_every_format(write: Write, tmp_path: Path) -> None:
    """The checks of the tasks accept them, also from a folder of the Hub's layout."""
    name = write(tmp_path / "train", [CONVERSATION, CONVERSATION])
    columns = Chat(messages="value").select_columns(None)
    assert [json.loads(row["messages"]) for row in load(name, columns)] == [CONVERSATION] * 2
    from_folder = Hub(path=str(tmp_path), config=None, id=None).load("train", columns)
    assert list(from_folder["messages"]) == [json.dumps(CONVERSATION, ensure_ascii=False)] * 2
    task = Choices(prompt="other", choices="value", answer="value")
    assert task.select_columns(None).structured == {"choices", "answer"}


def test_optional_cell_may_be_empty(tmp_path: Path) -> None:
    """It is empty text, in each form of a missing value."""
    columns = Columns({"value": "value", "more": "more"}, optional=frozenset({"more"}))
    rows = [
        '{"value": "a", "more": "b"}',
        '{"value": "a", "more": null}',
        '{"value": "a", "more": ""}',
        '{"value": "a"}',
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert [row["more"] for row in load(str(tmp_path / "rows.jsonl"), columns)] == ["b", "", "", ""]
    (tmp_path / "rows.csv").write_text("value,more\na,b\na,\n", encoding="utf-8")
    assert [row["more"] for row in load(str(tmp_path / "rows.csv"), columns)] == ["b", ""]


def test_other_checks_and_kinds_of_columns_are_read_again(tmp_path: Path) -> None:
    """The cache's key has them."""
    name = write_csv(tmp_path / "rows", ['["a"]'])
    as_text = Columns({"value": "value"})
    assert load(name)[0]["value"] == load(name, as_text)[0]["value"] == '["a"]'
    keys = [
        COLUMNS.cache_key,
        as_text.cache_key,
        Columns({"value": "value"}, optional=frozenset({"value"})).cache_key,
        Columns({"value": "value"}, version=2).cache_key,
        Columns({"value": "value"}, id="other").cache_key,
    ]
    assert len({json.dumps(key) for key in keys}) == len(keys)
