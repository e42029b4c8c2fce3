"""Opening of text files as UTF-8, and a sentence on the encoding of a file that is not UTF-8."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from peftbench.common.text import first_line
from peftbench.data.readers.rows import SplitLocation
from peftbench.errors import DataError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Compression by the last suffix of a file's name."""
_SAMPLE_BYTES = 1 << 16
_SIGNATURES = {
    b"\x1f\x8b": ("is compressed with gzip", "rename it to end in .gz"),
    b"PK\x03\x04": ("is a ZIP archive or an Excel workbook", "extract it, or export its sheet as CSV"),
    b"BZh": ("is compressed with bzip2", "decompress it with bunzip2"),
    b"\x28\xb5\x2f\xfd": ("is compressed with zstd", "rename it to end in .zst"),
    b"\xfd7zXZ\x00": ("is compressed with xz", "decompress it with unxz"),
    b"PAR1": ("is a Parquet file", "rename it to end in .parquet"),
    b"ARROW1": ("is an Arrow file", "convert it to Parquet"),
}
_GIT_LFS_START = b"version https://git-lfs.github.com/spec/"
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_NUL_SHARE = 0.2
"""Share of zero bytes from which a text is taken for UTF-16; text of the Latin alphabet has one in two."""
_WESTERN_SHARE = 0.3
"""Share of bytes above 127 among letters up to which a text is taken for a western European language."""


@contextmanager
def open_text(location: SplitLocation, kind: str, newline: str) -> Iterator[TextIO]:
    """Open a file as UTF-8 without its byte order mark.

    Raises:
        DataError: it cannot be read, is binary, or is not UTF-8.
    """
    path = Path(location.path)
    try:
        with open_bytes(path) as file:
            start = file.read(_SAMPLE_BYTES)
        refuse_other_formats(start, location, kind)
        with open_bytes(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline) as text:
            yield text
    except OSError as error:
        if error.errno is None:  # of the decompressor
            fault = f"it is not a complete {path.suffix} file ({first_line(error).rstrip('.')})"
            raise location.unreadable(kind, fault, "compress it again") from error
        raise location.read_error(error) from error
    except UnicodeDecodeError as error:
        raise location.unreadable(kind, *describe_encoding(path)) from error


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading; a file that ends in .gz or .zst is decompressed.

    Raises:
        OSError: it cannot be read; without an errno if it is not compressed as its name states.
    """
    with path.open("rb") as file:
        if path.suffix not in COMPRESSIONS:
            yield file
            return
        import pyarrow

        with pyarrow.CompressedInputStream(file, COMPRESSIONS[path.suffix]) as stream:
            yield io.BufferedReader(stream)  # type: ignore[arg-type]


def refuse_other_formats(start: bytes, location: SplitLocation, kind: str) -> None:
    """Check that a file does not start like one of another format or in another encoding.

    Raises:
        DataError: it does.
    """
    if start.startswith(_GIT_LFS_START):
        raise DataError(f"{location.path} is a git-lfs pointer, not the data", "fetch the data with: git lfs pull")
    for signature, (fault, advice) in _SIGNATURES.items():
        if start.startswith(signature):
            raise location.unreadable(kind, f"it {fault}", advice)
    if (encoding := _find_wide_encoding(start)) is not None:
        raise location.unreadable(kind, f"it is likely {encoding}, not UTF-8", _advise_conversion(encoding))


def describe_encoding(path: Path) -> tuple[str, str]:
    """Return which byte of a file is not UTF-8 and the likely encoding, and what to do."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return _describe_invalid_line(number, line, error)
    return "it changed while it was read", "run again"


def _describe_invalid_line(number: int, line: bytes, error: UnicodeDecodeError) -> tuple[str, str]:
    fault = f"byte 0x{line[error.start]:02x} in line {number} is not UTF-8"
    if error.reason == "unexpected end of data" and not line.endswith(b"\n"):
        return f"{fault}: the file ends inside a character", "copy it again, it may be cut off"
    if any(character > "\x7f" for character in line[: error.start].decode("utf-8")):
        return f"{fault}, though the text before it is", "correct that character"
    high = sum(byte > 0x7F for byte in line)
    letters = high + sum(65 <= byte & ~0x20 <= 90 for byte in line)
    if high > _WESTERN_SHARE * letters:
        return (
            f"{fault}; it likely has a legacy encoding (for example Windows-1251 or GB18030)",
            "convert it to UTF-8, for example with: iconv -f WINDOWS-1251 -t UTF-8",
        )
    return f"{fault}; it is likely Latin-1 or Windows-1252", _advise_conversion("WINDOWS-1252")


def _find_wide_encoding(start: bytes) -> str | None:
    """Return UTF-16 or UTF-32 if a file's first bytes look like it."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return encoding
    if len(start) < 2:
        return None
    even, odd = start[::2].count(0) / len(start[::2]), start[1::2].count(0) / len(start[1::2])
    if max(even, odd) > _NUL_SHARE and min(even, odd) < max(even, odd) / 4:
        return "UTF-16LE" if odd > even else "UTF-16BE"
    return None


def _advise_conversion(encoding: str) -> str:
    return f"convert it to UTF-8, for example with: iconv -f {encoding} -t UTF-8"
