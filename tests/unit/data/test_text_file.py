"""Files in another encoding or format: a sentence that names it and how to convert it."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
from pathlib import Path

import pytest

from peftbench.data.sources import Files
from peftbench.errors import DataError
from tests.helpers.summaries import load_summaries

CSV = "article,summary\nCafé au lait à Paris.,été\n"
JSON_LINES = '{"article": "Café au lait à Paris.", "summary": "été"}\n'
TEXTS = {".csv": CSV, ".jsonl": JSON_LINES}


def refuse(path: Path, content: bytes) -> str:
    """Write a file and return the message of its refusal."""
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load_summaries(Files(train=str(path)))
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize("suffix", TEXTS)
@pytest.mark.parametrize(
    ("encoding", "fault"),
    [
        ("latin-1", "byte 0xe9 in line {line} is not UTF-8; it is likely Latin-1 or Windows-1252"),
        ("cp1252", "byte 0xe9 in line {line} is not UTF-8; it is likely Latin-1 or Windows-1252"),
        ("utf-16", "it is likely UTF-16, not UTF-8"),
        ("utf-16-le", "it is likely UTF-16LE, not UTF-8"),
        ("utf-16-be", "it is likely UTF-16BE, not UTF-8"),
        ("utf-32", "it is likely UTF-32, not UTF-8"),
    ],
)
def test_other_encoding_is_named_with_its_conversion(encoding: str, fault: str, suffix: str, tmp_path: Path) -> None:
    """The message has the likely encoding and a command."""
    message = refuse(tmp_path / f"rows{suffix}", TEXTS[suffix].encode(encoding))
    assert fault.format(line=2 if suffix == ".csv" else 1) in message
    assert "; convert it to UTF-8, for example with: iconv -f " in message


def test_text_of_another_script_is_not_taken_for_latin(tmp_path: Path) -> None:
    """Most bytes of a Russian text in Windows-1251 are above 127."""
    message = refuse(tmp_path / "rows.csv", "article,summary\nРека поднялась,Город\n".encode("cp1251"))
    assert "it likely has a legacy encoding" in message


@pytest.mark.parametrize("suffix", TEXTS)
def test_byte_order_mark_is_dropped(suffix: str, tmp_path: Path) -> None:
    """Excel writes it before the name of the first column."""
    path = tmp_path / f"rows{suffix}"
    path.write_text(TEXTS[suffix], encoding="utf-8-sig")
    assert list(load_summaries(Files(train=str(path)))) == [
        {"id": "0", "article": "Café au lait à Paris.", "summary": "été"}
    ]


def test_damaged_utf8_is_not_taken_for_another_encoding(tmp_path: Path) -> None:
    """A line with valid characters, and a file that ends inside one."""
    message = refuse(tmp_path / "rows.csv", "article,summary\né,a".encode() + b"\xff\n")
    assert "byte 0xff in line 2 is not UTF-8, though the text before it is; correct that character" in message
    message = refuse(tmp_path / "rows.csv", "article,summary\na,é".encode()[:-1])
    assert "the file ends inside a character; copy it again" in message


def test_byte_far_into_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    """The line is counted over the whole file."""
    message = refuse(tmp_path / "rows.csv", b"article,summary\n" + b"a,b\n" * 50_000 + b"caf\xe9 au lait,d\n")
    assert "byte 0xe9 in line 50002 is not UTF-8" in message


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (gzip.compress(JSON_LINES.encode()), "is compressed with gzip; rename it to end in .gz"),
        (bz2.compress(JSON_LINES.encode()), "is compressed with bzip2"),
        (lzma.compress(JSON_LINES.encode()), "is compressed with xz"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "is a git-lfs pointer, not the data"),
    ],
    ids=["gzip", "bzip2", "xz", "git-lfs"],  # the compressed bytes have the time
)
def test_other_format_is_named(content: bytes, fault: str, suffix: str, tmp_path: Path) -> None:
    """The message has the format, not the first byte that cannot be parsed."""
    assert fault in refuse(tmp_path / f"rows{suffix}", content)


def test_workbook_and_parquet_are_named(tmp_path: Path) -> None:
    """Both are common under the name of a CSV file."""
    with zipfile.ZipFile(tmp_path / "book", "w") as archive:
        archive.writestr("xl/workbook.xml", "")
    assert "is a ZIP archive or an Excel workbook" in refuse(tmp_path / "rows.csv", (tmp_path / "book").read_bytes())
    assert "is a Parquet file; rename it to end in .parquet" in refuse(tmp_path / "rows.csv", b"PAR1rest")
