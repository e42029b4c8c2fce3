"""Files with seeded faults: each is loaded as it is written, or refused with one sentence."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from peftbench.data.sources import Files
from peftbench.errors import PeftbenchError
from tests.helpers.mutated_files import COLUMNS, FORMATS, build_file, parse_csv, read_written_text
from tests.helpers.summaries import load_summaries, summary_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftbench.data.encode import Encoder

FAST = 50
ALL = 500
ALLOWED_EXIT_CODES = {20, 21, 22, 23, 24, 25, 50, 51, 52}
SAME_TIME = (10**9, 10**9)


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Return an encoder with room for the longest cells."""
    return summary_encoder(tokenizer)


def check_file(seed: int, folder: Path, encoder: Encoder) -> str:
    """Load and encode the file of a seed, and check the result; return loaded or refused."""
    suffix, content, rows = build_file(seed)
    path = folder / f"rows{suffix}"
    path.write_bytes(content)
    os.utime(path, SAME_TIME)  # no cache may recognize a file by its path and time
    refusal = None
    try:
        dataset = load_summaries(Files(train=str(path), id="id"))
        encoded, _ = encoder.encode_split(dataset, "train", "drop")
    except PeftbenchError as error:
        refusal = error
    if refusal is not None:
        assert rows is None, f"seed {seed}: a valid file is refused: {refusal}"
        assert refusal.exit_code in ALLOWED_EXIT_CODES, seed
        assert str(refusal).isprintable(), f"seed {seed}: {str(refusal)!r}"
        assert path.name in str(refusal), seed
        return "refused"
    loaded = [tuple(row[column] for column in COLUMNS) for row in dataset]
    assert loaded == read_written_text(suffix, content), seed
    if rows is not None:
        assert loaded == [tuple(row[column] for column in COLUMNS) for row in rows], seed
    assert len(encoded) == len(loaded), seed
    return "loaded"


def check_files(seeds: Iterable[int], folder: Path, encoder: Encoder) -> None:
    """Check the files of several seeds; each format must be loaded and refused at least once in ten."""
    seeds = list(seeds)
    outcomes = Counter((FORMATS[seed % len(FORMATS)], check_file(seed, folder, encoder)) for seed in seeds)
    for suffix in FORMATS:
        for outcome in ("loaded", "refused"):
            assert outcomes[suffix, outcome] >= len(seeds) // len(FORMATS) // 10, outcomes


def test_mutated_files_are_loaded_as_written_or_refused(tmp_path: Path, encoder: Encoder) -> None:
    """No other exception is raised, and no cell differs from the text in the file."""
    check_files(range(FAST), tmp_path, encoder)


@pytest.mark.slow
def test_many_mutated_files_are_loaded_as_written_or_refused(tmp_path: Path, encoder: Encoder) -> None:
    """The same for the other seeds."""
    check_files(range(FAST, ALL), tmp_path, encoder)


@pytest.mark.parametrize(
    ("text", "records"),
    [
        ('a,b\n1,"x,""y""\nz"\n', [["a", "b"], ["1", 'x,"y"\nz']]),
        ("a,b\r\n\r\n1,\r\n", [["a", "b"], ["1", ""]]),
        ('a\n""\n', [["a"]]),
    ],
)
def test_reference_parser_follows_the_grammar(text: str, records: list[list[str]]) -> None:
    """The reading that loaded cells are compared with is right on its own."""
    assert parse_csv(text) == records
