"""Small text helpers."""

from __future__ import annotations

import os
import re

INTERPOLATION_PREFIX = "${"
_INTERPOLATION_PATTERN = re.compile(r"(\\*)\$\{")


def escape_interpolation(text: str) -> str:
    r"""Return ``text`` with OmegaConf's interpolations escaped; each ``\`` before one is doubled to stay literal."""
    return _INTERPOLATION_PATTERN.sub(r"\1\1\\${", text)


def expand_home(path: str) -> str:
    """Return ``path`` with a leading ``~`` or ``~user`` expanded; unchanged if there is no such user."""
    return os.path.expanduser(path)  # noqa: PTH111 — Path.expanduser raises for an unknown user, and drops slashes


def make_encodable(text: str) -> str:
    """Return ``text`` with the bytes of undecodable file names decoded as UTF-8.

    Python represents such bytes by characters that no file can store. Bytes that are not UTF-8 become U+FFFD.
    """
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def first_line(error: BaseException, max_length: int | None = None) -> str:
    """Return the first line of an error's message, its type's name if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0][:max_length] if text else type(error).__name__
