"""Remove the folders of the machine from what is published: of an absolute path, only the last name is kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

_PATH_PATTERN = re.compile(r"(?<![\w:/.~\\-])(?:~|[A-Za-z]:)?(?:[\\/][^\s\\/'\"`,;:()=]+){2,}")
"""An absolute path of at least two names in a text, and no part of a URL or of a relative path."""


def hide_folders(value: Any) -> Any:  # noqa: ANN401 — any value of JSON
    """Return a value of JSON in which every text that is an absolute path is its last name."""
    if isinstance(value, Mapping):
        return {key: hide_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_folders(item) for item in value]
    return get_last_name(value) if isinstance(value, str) and _is_absolute(value) else value


def hide_folders_in_text(text: str, known_paths: Iterable[str] = ()) -> str:
    """Return a text in which each absolute path is its last name.

    ``known_paths`` are found whatever characters they have. Others end at a space or a quote.
    """
    home = str(Path.home())
    for path in sorted({*known_paths, str(Path.cwd())}, key=len, reverse=True):
        if _is_absolute(path) and get_last_name(path):
            text = text.replace(path, get_last_name(path))
    if get_last_name(home):
        text = text.replace(f"{home}/", "~/")
    return _PATH_PATTERN.sub(lambda match: get_last_name(match.group()), text)


def iter_texts(value: object) -> Iterator[str]:
    """Yield every text in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for item in value.values() for text in iter_texts(item))
    elif isinstance(value, (list, tuple)):
        yield from (text for item in value for text in iter_texts(item))


def get_last_name(path: str) -> str:
    """Return the last name of a path of POSIX or Windows."""
    return PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name


def _is_absolute(text: str) -> bool:
    return "\n" not in text and (
        PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or text.startswith("~")
    )
