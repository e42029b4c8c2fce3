"""Output to a terminal or pipe that cannot encode every character, e.g. with LANG=C or PYTHONIOENCODING=ascii."""

from __future__ import annotations

import codecs
import io
import sys

_ERROR_HANDLER = "peftbench.replace"
_SURROGATES = range(0xDC80, 0xDD00)
"""Python decodes a byte 0x80 to 0xff of a file's name that is not text to one of these characters."""


def replace_unencodable_characters() -> None:
    """Print a question mark for a character that standard output or standard error cannot encode.

    Bytes of a file's name that are not text are printed unchanged.
    """
    codecs.register_error(_ERROR_HANDLER, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERROR_HANDLER)


def _replace(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    codes = map(ord, error.object[error.start : error.end])
    return b"".join(bytes([code - 0xDC00]) if code in _SURROGATES else b"?" for code in codes), error.end
