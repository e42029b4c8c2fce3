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
from peftbench.tasks.summarization import Summarization

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from peftbench.data.readers.rows import Example

TASK = Summarization(summary="highlights")


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

        ids = [ids for ids, _ in self.rows]
        return Dataset.from_dict({"input_ids": ids, "label_spans": [[prompt, len(row)] for row, prompt in self.rows]})

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
        SequenceLayout.for_model(max_length=longest, max_new_tokens=1, max_positions=positions, virtual_tokens=0),
        TASK,
    )
    rows: list[tuple[list[int], int]] = []
    wanted = spec.examples(job.case)
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            encoded = encoder.encode_example(_parse_example(path, number, line))
            if encoded["needed"] <= longest:
                rows.append((list(encoded["input_ids"]), int(encoded["label_spans"][0])))
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


def _parse_example(path: Path, number: int, line: str) -> Example:
    try:
        row = json.loads(line)
        cells = {name: str(row[column]) for name, column in TASK.columns.items()}
    except json.JSONDecodeError as error:
        raise DataError(f"line {number} of {path} is not JSON ({error.msg})") from error
    except (KeyError, TypeError) as error:
        raise MissingColumnError(
            f"line {number} of {path} lacks the columns {' and '.join(TASK.columns.values())}"
        ) from error
    return {"id": str(number)} | cells
