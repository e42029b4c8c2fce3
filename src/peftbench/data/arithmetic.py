"""Arithmetic problems in sentences, with worked answers: a small reasoning task of our own, made by this module.

The texts are dedicated to the public domain (CC0 1.0).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy
from pydantic import Field

from peftbench.data.generated import GeneratedRow, GeneratedSource, build_row
from peftbench.data.synthetic import SPLIT_SEEDS

_NAMES = ("Ada", "Ben", "Chen", "Dora", "Emil", "Fay", "Goran", "Hana", "Ivan", "Judy", "Kofi", "Lena")
_THINGS = ("apples", "books", "coins", "drawings", "eggs", "flowers", "marbles", "pencils", "shells", "tickets")
_NUM_CHOICES = 4
# Placeholders: a and b are numbers, n a name, t a thing. The operation is that of the answer.
_TEMPLATES = (
    ("{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?", "+"),
    ("{n} finds {a} {t} in the morning and {b} {t} in the evening. How many {t} does {n} find in all?", "+"),
    ("There are {a} {t} in a box. {n} puts {b} more into it. How many {t} are in the box?", "+"),
    ("{n} has {a} {t} and loses {b}. How many {t} are left?", "-"),
    ("A shop has {a} {t} and sells {b} of them to {n}. How many {t} remain in the shop?", "-"),
    ("{n} needs {a} {t} and already has {b}. How many {t} are missing?", "-"),
    ("{n} packs {a} bags with {b} {t} each. How many {t} does {n} pack?", "x"),
    ("Each of {a} friends brings {b} {t} to {n}. How many {t} does {n} get?", "x"),
)


class Problem(NamedTuple):
    """A problem with its two numbers."""

    text: str
    first: int
    second: int
    operation: str
    thing: str

    def build_row(self, id: str, generator: numpy.random.Generator) -> GeneratedRow:
        """Return the row of the problem, with wrong choices that are close to the result."""
        first, second = self.first, self.second
        result = {"+": first + second, "-": first - second, "x": first * second}[self.operation]
        others = [result + delta for delta in (-2, -1, 1, 2, 10) if result + delta >= 0]
        wrong = generator.choice(others, size=_NUM_CHOICES - 1, replace=False).tolist()
        choices = [f"{number} {self.thing}" for number in generator.permutation([result, *wrong]).tolist()]
        completion = f" {first} {self.operation} {second} = {result}\n#### {result}"
        return build_row(id, f"{self.text}\nAnswer:", completion, choices, f"{result} {self.thing}")


class Arithmetic(GeneratedSource):
    """Arithmetic problems in sentences, with answers like GSM8K's: a calculation, then ``####`` and the number."""

    kind: Literal["arithmetic"] = "arithmetic"
    """Kind of source."""
    examples: int = Field(default=1000, gt=0)
    """Number of problems in each split. No problem is in two splits."""
    largest: int = Field(default=20, ge=4)
    """Largest number in a problem."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed for the problems."""

    @property
    def implied_task(self) -> str:
        return "completion"

    def iter_rows(self, split: str) -> Iterator[GeneratedRow]:
        generator = numpy.random.default_rng([self.seed, SPLIT_SEEDS[split]])
        found = 0
        while found < self.examples:
            problem = self._draw(generator)
            if _find_split(problem.text) == split:
                yield problem.build_row(f"{split}-{found}", generator)
                found += 1

    def fingerprint(self, split: str | None = None) -> str:
        content = self.model_dump_json() + repr((_NAMES, _THINGS, _TEMPLATES, _NUM_CHOICES))
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def _draw(self, generator: numpy.random.Generator) -> Problem:
        template, operation = _TEMPLATES[int(generator.integers(len(_TEMPLATES)))]
        first, second = sorted(map(int, generator.integers(2, self.largest + 1, size=2)), reverse=True)
        name, thing = (names[int(generator.integers(len(names)))] for names in (_NAMES, _THINGS))
        return Problem(template.format(n=name, t=thing, a=first, b=second), first, second, operation, thing)


def _find_split(problem: str) -> str:
    """Return the split of a problem, from its text alone: one in ten is for validation, one in ten for test."""
    digit = hashlib.blake2b(problem.encode(), digest_size=2).digest()[0] % 10
    return {0: "validation", 1: "test"}.get(digit, "train")
