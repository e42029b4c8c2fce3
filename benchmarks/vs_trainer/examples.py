"""The examples of all arms, encoded by peftbench's encoder and in peftbench's order."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spec import Job

from peftbench.data.batches import Batches
from peftbench.data.collate import Collator, FlopUnits
from peftbench.data.encode import Encoder, SequenceLayout
from peftbench.errors import DataError, EmptySplitError, MissingColumnError
from peftbench.recipe.schema import Data

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("article", "highlights")
SEPARATOR: str = Data.model_fields["separator"].default


@dataclass(frozen=True)
class Examples:
    """Encoded examples, and the global batches drawn from them."""

    rows: tuple[tuple[list[int], int], ...]
    """Token ids of each example, and how many of them are not labels."""
    batches: tuple[tuple[int, ...], ...]
    """Example indices of each step."""
    end: int
    """Id of the end token."""
    fingerprint: str
    """Hash of the file."""

    def dataset(self) -> Dataset:
        """Return each example once, in the format of peftbench's training loop."""
        from datasets import Dataset

        ids, prompts = zip(*self.rows, strict=True)
        return Dataset.from_dict({"input_ids": list(ids), "prompt_tokens": list(prompts)})

    def step(self, index: int) -> list[tuple[list[int], int]]:
        """Return a step's examples, shortest first, as in peftbench's global batch."""
        return sorted((self.rows[i] for i in self.batches[index]), key=lambda row: len(row[0]))

    def real_tokens(self) -> tuple[int, ...]:
        """Return the real tokens of each step."""
        return tuple(sum(len(ids) for ids, _ in self.step(index)) for index in range(len(self.batches)))

    def labeled_tokens(self) -> tuple[int, ...]:
        """Return the labels of each step."""
        return tuple(sum(len(ids) - prompt for ids, prompt in self.step(i)) for i in range(len(self.batches)))

    def count_flop_units(self, index: int, virtual_tokens: int) -> FlopUnits:
        """Return a step's model FLOP units: real and virtual positions, causal pairs, the head at labels."""
        lengths = [len(ids) + virtual_tokens for ids, _ in self.step(index)]
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        return FlopUnits(positions=sum(lengths), pairs=pairs, causal_pairs=pairs, labeled=self.labeled_tokens()[index])


def read_examples(job: Job, tokenizer: PreTrainedTokenizerBase, positions: int) -> Examples:
    """Read the first examples of the file, as many as the case needs.

    Raises:
        DataError: a line is invalid, or the file has too few examples.
    """
    spec, path = job.spec, Path(job.train)
    longest = positions - spec.num_virtual_tokens  # for every method, so that all see the same text
    encoder = Encoder(
        tokenizer,
        SequenceLayout.for_model(
            separator=SEPARATOR, max_length=longest, max_new_tokens=1, max_positions=positions, virtual_tokens=0
        ),
    )
    rows: list[tuple[list[int], int]] = []
    wanted = spec.examples(job.case)
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            article, summary = _pair(path, number, line)
            encoded = encoder.encode_example(article, summary)
            if encoded["needed"] <= longest:
                rows.append((list(encoded["input_ids"]), int(encoded["prompt_tokens"])))
            if len(rows) == wanted:
                break
    if len(rows) < wanted:
        raise EmptySplitError(f"{path} has {len(rows)} usable examples, but {wanted} are needed; use fewer steps")
    unordered = Examples(tuple(rows), (), encoder.eos_token_id, "")
    batches = Batches(unordered.dataset(), Collator(pad_token_id=encoder.eos_token_id), spec.batch, None, spec.seed)
    order = batches.sample_indices()
    drawn = tuple(tuple(itertools.islice(order, spec.batch)) for _ in range(spec.total_steps(job.case)))
    return Examples(
        tuple(rows), drawn, encoder.eos_token_id, hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    )


def _pair(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        article, summary = (str(row[column]) for column in COLUMNS)
    except json.JSONDecodeError as error:
        raise DataError(f"line {number} of {path} is not JSON ({error.msg})") from error
    except (KeyError, TypeError) as error:
        raise MissingColumnError(f"line {number} of {path} lacks the columns {' and '.join(COLUMNS)}") from error
    return article, summary
