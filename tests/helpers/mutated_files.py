"""Data files with seeded faults, and an independent reading of the text in them."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from typing import Any, Literal

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
COLUMNS = ("id", "article", "summary")
CELLS = [
    *("00500", "1.10", "1e5", "NA", "N/A", "None", "null", "nan", "NaN", "#N/A", "true", "2020-01-01", "-", "0", "\\N"),
    *("b'x'", " padded ", 'a "quoted" term', 'ends in a quote"', "a, b", "a;b", "'single'", '="1"', '{"a": 1}', "[1]"),
    *("two\nlines", "carriage\r\nreturn", "tab\there", "x\x0by", "line\u2028separator", "\\", "C:\\dir", "<br>"),
    *("Café", "Река", "日本語", "😀", "🇩🇪 flag"),
]
_JUNK = [
    b",",
    b'"',
    b"'",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\n",
    b"\r",
    b"\0",
    b":",
    b";",
    b"\\",
    b"\xff",
    b"\xc3",
    b"NaN",
    b" ",
]
Rows = list[dict[str, Any]]


def build_file(seed: int) -> tuple[str, bytes, Rows | None]:
    """Return the suffix and the bytes of a file, and its rows if it has no fault."""
    generator = random.Random(seed)  # noqa: S311
    suffix = FORMATS[seed % len(FORMATS)]
    rows: Rows = [
        {column: generator.choice(CELLS) for column in COLUMNS} | {"other": generator.choice([1, None, "x", 2.5])}
        for _ in range(generator.randint(1, 12))
    ]
    faults = _CELL_FAULTS if generator.random() < 0.3 else []
    for fault in faults:
        if generator.random() < 0.3:
            fault(generator, rows)
    content = _WRITERS[suffix](generator, rows)
    mutated = content
    for _ in range(generator.choice([0, 1, 1, 2])):
        mutated = generator.choice(_MUTATIONS)(generator, mutated)
    return suffix, mutated, None if faults or mutated != content else rows


def read_written_text(suffix: str, content: bytes) -> list[tuple[str, ...]]:
    """Return the used cells of a file as they are written; without an interpretation of any of them."""
    if suffix == ".parquet":
        return _read_parquet(content)
    text = content.decode("utf-8-sig")
    if suffix == ".csv":
        header, *records = parse_csv(text)
        return [tuple(record[header.index(column)] for column in COLUMNS) for record in records]
    if suffix == ".json" and text.lstrip().startswith("["):
        objects = json.loads(text, parse_int=str)
    else:
        objects = [json.loads(line, parse_int=str) for line in text.split("\n") if line.strip(" \t\r")]
    return [tuple(row[column] for column in COLUMNS) for row in objects]


def parse_csv(text: str) -> list[list[str]]:
    """Parse CSV by the grammar of RFC 4180, character by character; blank lines are skipped."""
    records, record, cell, position = [], [], "", 0
    while position < len(text):
        if text[position] == '"' and not cell:
            end = position + 1
            while text[end] != '"' or text[end : end + 2] == '""':
                end += 2 if text[end] == '"' else 1
            cell, position = text[position + 1 : end].replace('""', '"'), end + 1
            assert position == len(text) or text[position] in ",\r\n"
        else:
            end = position
            while end < len(text) and text[end] not in ",\r\n":
                end += 1
            cell, position = text[position:end], end
        record.append(cell)
        is_last = position == len(text) or text[position] != ","
        cell = ""
        if not is_last:
            position += 1
            if position < len(text) and text[position] not in "\r\n":
                continue
            record.append("")
        if text[position : position + 2] == "\r\n":
            position += 1
        position += 1
        if record != [""]:
            records.append(record)
        record = []
    return records


def _read_parquet(content: bytes) -> list[tuple[str, ...]]:
    from pyarrow import parquet

    rows = parquet.read_table(io.BytesIO(content), columns=list(COLUMNS)).to_pylist()
    texts = [[row[column] for column in COLUMNS] for row in rows]
    return [tuple(cell.decode() if isinstance(cell, bytes) else str(cell) for cell in row) for row in texts]


# --- faults of cells and columns -------------------------------------------------------------------------------------


def _change_cell(generator: random.Random, rows: Rows) -> None:
    value: Any = generator.choice([None, "", " ", 5, 1.10, float("nan"), float("inf"), True, ["a"], {"a": 1}, "\ud800"])
    generator.choice(rows)[generator.choice(COLUMNS)] = value


def _drop_cell(generator: random.Random, rows: Rows) -> None:
    generator.choice(rows).pop(generator.choice(COLUMNS), None)


def _change_column(generator: random.Random, rows: Rows) -> None:
    column = generator.choice(COLUMNS)
    value = generator.choice([5, 1.5, "00500", b"bytes", b"\xff", True, ["a"]])
    for row in rows:
        row[column] = value


_CELL_FAULTS: list[Callable[[random.Random, Rows], None]] = [_change_cell, _drop_cell, _change_column]


# --- writers ---------------------------------------------------------------------------------------------------------


def _to_json(generator: random.Random, row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=generator.random() < 0.5 or "\ud800" in row.values(), default=repr)


def _write_json_lines(generator: random.Random, rows: Rows) -> bytes:
    end = generator.choice(["\n", "\r\n", "\n\n"])
    return "".join(_to_json(generator, row) + end for row in rows).encode()


def _write_json(generator: random.Random, rows: Rows) -> bytes:
    if generator.random() < 0.3:
        return _write_json_lines(generator, rows)
    return (
        "[" + generator.choice([",", ",\n", " ,\r\n "]).join(_to_json(generator, row) for row in rows) + "]"
    ).encode()


def _write_csv(generator: random.Random, rows: Rows) -> bytes:
    quoting: Literal[0, 1] = csv.QUOTE_MINIMAL if generator.random() < 0.5 else csv.QUOTE_ALL
    file = io.StringIO(newline="")
    writer = csv.DictWriter(
        file, [*COLUMNS, "other"], quoting=quoting, lineterminator=generator.choice(["\n", "\r\n"]), restval=""
    )
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode("utf-8", "replace")


def _write_parquet(generator: random.Random, rows: Rows) -> bytes:
    import pyarrow
    from pyarrow import parquet

    columns = {}
    for column in COLUMNS:
        values = [row.get(column) for row in rows]
        try:
            columns[column] = pyarrow.array(values)
        except (pyarrow.ArrowException, UnicodeEncodeError):  # mixed types
            columns[column] = pyarrow.array([repr(value) for value in values])
        if pyarrow.types.is_string(columns[column].type):
            kind = generator.choice([pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.string_view()])
            columns[column] = columns[column].cast(kind)
    file = io.BytesIO()
    compression = generator.choice(["none", "snappy", "zstd"])
    parquet.write_table(
        pyarrow.table(columns), file, compression=compression, write_page_checksum=generator.random() < 0.5
    )
    return file.getvalue()


_WRITERS: dict[str, Callable[[random.Random, Rows], bytes]] = {
    ".jsonl": _write_json_lines,
    ".json": _write_json,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}


# --- faults of bytes -------------------------------------------------------------------------------------------------


def _insert(generator: random.Random, content: bytes) -> bytes:
    place = generator.randint(0, len(content))
    return content[:place] + generator.choice(_JUNK) + content[place:]


def _delete(generator: random.Random, content: bytes) -> bytes:
    place = generator.randint(0, len(content))
    return content[:place] + content[place + generator.randint(1, 8) :]


def _flip(generator: random.Random, content: bytes) -> bytes:
    if not content:
        return content
    place = generator.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :]


def _delete_character(generator: random.Random, content: bytes) -> bytes:
    character = generator.choice(_JUNK[:8])
    places = [place for place in range(len(content)) if content.startswith(character, place)]
    place = generator.choice(places or [0])
    return content[:place] + content[place + 1 :]


def _cut(generator: random.Random, content: bytes) -> bytes:
    return content[: generator.randint(0, len(content))]


def _encode(generator: random.Random, content: bytes) -> bytes:
    encoding = generator.choice(["utf-16", "utf-16-le", "latin-1", "cp1251", "utf-8-sig", "utf-32"])
    return content.decode("utf-8", "replace").encode(encoding, "replace")


def _swap_lines(generator: random.Random, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    generator.shuffle(lines)
    return b"".join(lines)


def _join_lines(generator: random.Random, content: bytes) -> bytes:
    return content.replace(b"\n", b" ", generator.randint(1, 2))


_MUTATIONS: list[Callable[[random.Random, bytes], bytes]] = [
    _insert,
    _delete,
    _flip,
    _delete_character,
    _cut,
    _encode,
    _swap_lines,
    _join_lines,
]
