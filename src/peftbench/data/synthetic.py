"""Random text with sampled lengths, to measure memory and speed without a dataset."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Literal

import numpy
from pydantic import Field, field_validator

from peftbench.common.renamed_keys import MOVED_KEYS
from peftbench.data.base import Source
from peftbench.errors import MissingColumnError

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.data.readers.rows import Columns

# Frequent words. Nearly every tokenizer of English encodes each of them, with its leading space, as one token.
_WORDS = """the of and to in a is that for on with as was at by it from be this are have not he they or an were which we
there been has their more when will no if out so what up its about into than them can only other time new some could
these two may then do first any my now such like our over man me even most made after also many before must through
where your way well down should because each just those how too state very make still own see work long here get both
between being under never same another know while last might us old off since against go right used take three"""
SPLIT_SEEDS = {"train": 0, "validation": 1, "test": 2}
Quantiles = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=2)]


class Synthetic(Source):
    """Frequent words in random order, with the lengths of real prompts and completions."""

    kind: Literal["synthetic"] = "synthetic"
    """Kind of source."""
    examples: int = Field(default=512, gt=0)
    """Number of examples in each split."""
    prompt_tokens: Quantiles = (150, 330, 431, 532, 635, 740, 838, 928, 1080, 1272, 2223)
    """Quantiles of prompt lengths in tokens, shortest to longest, at equal steps; default: CNN/DailyMail's."""
    completion_tokens: Quantiles = (15, 41, 46, 50, 54, 57, 60, 63, 67, 72, 145)
    """Quantiles of completion lengths in tokens, in the same format."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed for the texts and their lengths."""

    # The defaults are the deciles of 675 pairs of CNN/DailyMail 3.0.0's training split under GPT-2's tokenizer.

    @field_validator("prompt_tokens", "completion_tokens")
    @classmethod
    def _check_sorted(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(value):
            raise ValueError("must be in ascending order: shortest length first")
        return value

    @property
    def implied_task(self) -> str:
        return "summarization"

    @property
    def is_mutable(self) -> bool:
        return False

    def sample_lengths(self, split: str) -> list[tuple[int, int]]:
        """Return the token counts of each example's prompt and completion, interpolated between the quantiles."""
        drawn = self._make_generator(split).random((2, self.examples))
        quantiles = (numpy.asarray(self.prompt_tokens), numpy.asarray(self.completion_tokens))
        lengths = [
            numpy.interp(shares, numpy.linspace(0, 1, len(values)), values).round().astype(int).tolist()
            for shares, values in zip(drawn, quantiles, strict=True)
        ]
        return list(zip(*lengths, strict=True))

    def read_column_names(self, split: str) -> list[str]:
        return ["prompt", "completion"]

    def load(self, split: str, columns: Columns) -> Dataset:
        from datasets import Dataset

        *prompts, last = columns.named
        if columns.structured:
            raise MissingColumnError(
                f"data.source.kind=synthetic has no column {columns.named[min(columns.structured)]!r}",
                "use a task whose columns hold text",
            )

        vocabulary, generator = _WORDS.split(), self._make_generator(split)

        def text(count: int) -> str:
            return " ".join(vocabulary[index] for index in generator.integers(len(vocabulary), size=count))

        return Dataset.from_list(
            [
                {"id": f"{split}-{index}"} | dict.fromkeys(prompts, text(prompt)) | {last: text(completion)}
                for index, (prompt, completion) in enumerate(self.sample_lengths(split))
            ]
        )

    def fingerprint(self, split: str | None = None) -> str:
        content = self.model_dump_json()
        for old, new in MOVED_KEYS.items():  # the content did not change with the names of its keys
            if new.startswith("data.source."):
                content = content.replace(f'"{new.rpartition(".")[2]}"', f'"{old.rpartition(".")[2]}"')
        return hashlib.blake2b((content + _WORDS).encode(), digest_size=16).hexdigest()

    def _make_generator(self, split: str) -> numpy.random.Generator:
        return numpy.random.default_rng([self.seed, SPLIT_SEEDS[split]])
