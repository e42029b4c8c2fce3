"""JSON files: text as it is written, and the line and the fault of each broken line."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftbench.data.sources import Files
from peftbench.errors import DataError, EmptySplitError, MissingColumnError
from tests.helpers.summaries import load_summaries

GOOD = '{"article": "a", "summary": "s"}\n'


def load(path: Path, content: str, **keys: str) -> list[dict[str, str]]:
    """Write a file, load it as the training split and return its rows."""
    path.write_bytes(content.encode())
    return list(load_summaries(Files(train=str(path), **keys)))


@pytest.mark.parametrize(
    "text", ["00500", "1.10", "NA", "None", "null", "nan", "2020-01-01", "true", " x ", "a\u2028b"]
)
def test_text_is_not_interpreted(text: str, tmp_path: Path) -> None:
    """Text that looks like a number, a date or a missing value is taken as it is written."""
    (row,) = load(tmp_path / "rows.jsonl", f'{{"id": "{text}", "article": "{text}", "summary": "{text}"}}', id="id")
    assert row == {"id": text, "article": text, "summary": text}


@pytest.mark.parametrize("number", ["7", "-0", "12345678901234567890123", "9" * 5000], ids=len)
def test_integer_id_is_taken_as_written(number: str, tmp_path: Path) -> None:
    """An id of any size keeps its digits."""
    content = f'{{"id": {number}, "article": "a", "summary": "s"}}'
    assert load(tmp_path / "rows.jsonl", content, id="id")[0]["id"] == number


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"article": "a",, "summary": "s"}', "has an extra comma (character 17)"),
        ('{"article": "a", "summary": "s",}', "has an extra comma (character 33)"),
        ('{"article": "a" "summary": "s"}', "lacks a comma or a closing bracket before"),
        ('{"article" "a", "summary": "s"}', "lacks a colon before"),
        ('{"article": "a", "summary": "s"', "ends before its object is complete"),
        ('{"article": "a", "summary":', "ends before its object is complete"),
        ('{"article": "a", "summary": "s"} x', "has 'x' after its object (character 34)"),
        ('{"article": "a", "summary": "s"}}', "has '}' after its object (character 33)"),
        (GOOD.strip() * 2, "has a second object (character 33)"),
        ("{'article': 'a', 'summary': 's'}", "has a single quote where JSON needs a double quote (character 2)"),
        ('{article: "a"}', "where a name in double quotes is expected (character 2)"),
        ('{"article": "a, "summary": "s"}', "lacks a comma or a closing bracket before"),
        ('{"article": "a", "summary": "s}', "has a string that is not closed at the end of the line"),
        ('{"article": "a\tb", "summary": "s"}', "has a raw control character (character 15); write it as \\t"),
        ('{"article": "a\0b", "summary": "s"}', "has a NUL byte (character 15)"),
        ("\0\0\0", "has a NUL byte (character 1)"),
        (GOOD.strip() + "\0", "has a NUL byte (character 33)"),
        ('{"article": "C:\\dir", "summary": "s"}', "has an invalid escape in a string"),
        ('{"article": NaN, "summary": "s"}', "has NaN, which JSON does not allow"),
        ('{"article": "a", "summary": "s", "score": -Infinity}', "has -Infinity, which JSON does not allow"),
        ('{"article": None, "summary": "s"}', "where a value is expected (character 13)"),
        ('{"article": "a", "summary": "s", "article": "b"}', "has the name 'article' twice"),
        ("[1, 2]", "is a list, not an object"),
        ('"text"', "is a string, not an object"),
        ("5.0", "is the number 5.0, not an object"),
        ("null", "is the value null, not an object"),
        ('{"article": ' + "[" * 100_000, "is nested too deeply"),
    ],
    ids=lambda value: value[:30],
)
def test_broken_line_is_named_with_its_fault(line: str, fault: str, tmp_path: Path) -> None:
    """The message has the file, the line and the fault, wherever the line is."""
    for before in (29, 1500):
        with pytest.raises(DataError) as error:
            load(tmp_path / "rows.jsonl", GOOD * before + line + "\n" + GOOD)
        assert f"rows.jsonl cannot be read as json: line {before + 1} " in str(error.value)
        assert fault in str(error.value)
        assert type(error.value) is DataError


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            '{\n "article": "a",\n "summary": "s"\n}\n{\n "article": "b"\n}\n',
            "line 1 ends before its object is complete",
        ),
        (GOOD + '{"article": "a", "summ', "line 2 has a string without its closing quote (character 18)"),
        (GOOD + '{"article": "a"', "line 2 ends before its object is complete, and the file may be cut off"),
        ("[\n" + GOOD + "]\n", "line 1 starts an array"),
        ("\n\n  [" + GOOD.strip() + "]", "line 3 starts an array"),
        ("// a comment\n" + GOOD, "line 1 has '// a comment' where a value is expected"),
        (GOOD + "\u3000\n", "line 2 has '\\u3000' where a value is expected"),
    ],
)
def test_other_layouts_are_named(content: str, fault: str, tmp_path: Path) -> None:
    """An object over several lines, an array, a file that is cut off, and a comment."""
    with pytest.raises(DataError) as error:
        load(tmp_path / "rows.jsonl", content)
    assert fault in str(error.value)


def test_array_is_read_from_a_json_file(tmp_path: Path) -> None:
    """A file whose name ends in .json may have one array, or one object on each line."""
    expected = [{"id": str(index), "article": "a", "summary": "s"} for index in range(2)]
    assert load(tmp_path / "rows.json", f"\ufeff [{GOOD}, \r\n{GOOD}]\n") == expected
    assert load(tmp_path / "rows.json", GOOD * 2) == expected


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (f"[{GOOD},{GOOD},]", "line 3 has an extra comma"),
        (f"[{GOOD}{GOOD}]", "line 2 lacks a comma or a closing bracket before"),
        (f"[{GOOD},\n1]", "line 3 is the number 1, not an object"),
        (f"[{GOOD}", "line 1 ends before its object is complete"),
        (f"[{GOOD}] x", "line 2 has 'x' after its object"),
        ('[{"article":\n\n"a" "summary": "s"}]', "line 3 lacks a comma or a closing bracket before"),
    ],
)
def test_broken_array_is_named_with_its_line(content: str, fault: str, tmp_path: Path) -> None:
    """The line is that of the fault, which may be after the start of its object."""
    with pytest.raises(DataError) as error:
        load(tmp_path / "rows.json", content)
    assert fault in str(error.value)


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("1.10", "the number 1.10"),
        ("5", "the number 5"),
        ("true", "the value true"),
        ('["a"]', "a list"),
        ('{"text": "a"}', "an object"),
        ('"\\ud800 x"', "\\ud800, which is half of a character,"),
    ],
)
def test_cell_that_is_not_text_is_refused(value: str, content: str, tmp_path: Path) -> None:
    """The message has the line, the column and the content as it is written."""
    with pytest.raises(DataError) as error:
        load(tmp_path / "rows.jsonl", GOOD + f'{{"article": "a", "summary": {value}}}\n')
    assert str(error.value).startswith("example 1 (line 2) of the train split of ")
    assert f"has {content} in column 'summary'; write" in str(error.value)


def test_empty_text_is_an_id(tmp_path: Path) -> None:
    """It is text as written; null and a missing name are not."""
    content = '{"id": "", "article": "a", "summary": "s"}\n'
    assert load(tmp_path / "rows.jsonl", content, id="id")[0]["id"] == ""
    with pytest.raises(DataError, match=r"example 1 \(line 2\) of .* has no id"):
        load(tmp_path / "rows.jsonl", content + '{"id": null, "article": "a", "summary": "s"}\n', id="id")


@pytest.mark.parametrize("value", ["1.0", "1e3", "false"])
def test_id_that_is_not_an_integer_or_text_is_refused(value: str, tmp_path: Path) -> None:
    """The advice names both."""
    with pytest.raises(DataError, match="in column 'id'; write text in double quotes, or an integer"):
        load(tmp_path / "rows.jsonl", f'{{"id": {value}, "article": "a", "summary": "s"}}', id="id")


@pytest.mark.parametrize(
    "row", ['{"article": "a"}', '{"article": "a", "summary": null}', '{"article": "a", "summary": ""}']
)
@pytest.mark.parametrize("place", [0, 1, 1200])
def test_missing_cell_is_refused_with_its_line(row: str, place: int, tmp_path: Path) -> None:
    """A missing name, null and empty text are the same, in the first line too."""
    lines = [GOOD] * 1300
    lines[place] = row + "\n"
    with pytest.raises(DataError, match=rf"example {place} \(line {place + 1}\) of .* has no summary") as error:
        load(tmp_path / "rows.jsonl", "".join(lines))
    assert not isinstance(error.value, MissingColumnError)


def test_unused_columns_may_have_any_value(tmp_path: Path) -> None:
    """Types that differ, nested values and repeated names do not matter outside the used columns."""
    lines = ['{"x": 1, "x": 2, "article": "a", "summary": "s"}', '{"x": {"y": []}, "article": "b", "summary": "t"}']
    assert [row["article"] for row in load(tmp_path / "rows.jsonl", "\n".join(lines))] == ["a", "b"]


@pytest.mark.parametrize("content", ["", "\n \r\n\n", "\ufeff"])
def test_blank_file_has_no_examples(content: str, tmp_path: Path) -> None:
    """The error has the class of an empty split."""
    with pytest.raises(EmptySplitError, match=r"rows\.jsonl has no examples"):
        load(tmp_path / "rows.jsonl", content)


def test_names_of_columns_stay_on_one_line(tmp_path: Path) -> None:
    """A file with many or odd names gives a short message."""
    names = ", ".join(f'"n\\n{index}": 1' for index in range(100))
    with pytest.raises(MissingColumnError, match="and 80 more") as error:
        load(tmp_path / "rows.jsonl", f"{{{names}}}\n")
    assert str(error.value).isprintable()
