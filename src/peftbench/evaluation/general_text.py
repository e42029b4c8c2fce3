"""The general text whose loss shows what a training did to the model's other abilities."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftbench.data.local_files import check_is_file
from peftbench.errors import DataError
from peftbench.shipped import GENERAL_TEXT_FILE, SHIPPED_GENERAL_TEXT
from peftbench.tasks.base import find_start_ids

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.data.encode import Encoder
    from peftbench.data.text_set import TextSet

WINDOW_TOKENS = 256
"""Most tokens of a window: short enough for every model, so that runs of one base model predict the same tokens."""


@dataclass(frozen=True)
class GeneralText:
    """A text and where it was read."""

    name: str
    """Value of ``evaluate.general_text``; of a data set its path, configuration and split."""
    text: str

    @property
    def fingerprint(self) -> str:
        """Digest of the text."""
        return hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest()


def read_general_text(source: str | TextSet) -> GeneralText:
    """Return the text that ``evaluate.general_text`` names.

    Raises:
        DataError: the file or data set cannot be read, is not UTF-8, or has no text.
    """
    name, text = (source, _read_file(source)) if isinstance(source, str) else (source.name, source.read())
    if len(text.split()) < 2:
        raise DataError(
            f"the text of evaluate.general_text={name!r} is too short to measure a loss",
            "give a text of at least a page",
        )
    return GeneralText(name, text)


def _read_file(name: str) -> str:
    """Return the shipped text, or that of a file."""
    described = f"evaluate.general_text={name!r}"
    path = GENERAL_TEXT_FILE if name == SHIPPED_GENERAL_TEXT else Path(name)
    check_is_file(path, described)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{described} is not UTF-8 text: byte {error.start} is invalid", "save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{described} cannot be read: {error.strerror}", "give a file that can be read") from error


def encode_windows(text: str, encoder: Encoder) -> tuple[Dataset, int]:
    """Return the text as consecutive windows of tokens, without overlap, and the most tokens of a window.

    Each window begins with the tokens that the tokenizer adds before every text. All tokens after the first are
    predicted.
    """
    from datasets import Dataset

    ids = encoder.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    length = min(WINDOW_TOKENS, encoder.layout.max_length)
    start_ids = find_start_ids(encoder.tokenizer)
    step = length - len(start_ids)
    windows = [[*start_ids, *ids[start : start + step]] for start in range(0, len(ids), step)]
    rows = [{"input_ids": ids, "label_spans": [len(start_ids), len(ids)]} for ids in windows if len(ids) > 1]
    return Dataset.from_list(rows), length
