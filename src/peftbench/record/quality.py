"""How good a trained model is."""

from __future__ import annotations

from pydantic import Field

from peftbench.common.schema import RecordModel


class Interval(RecordModel):
    """A mean, and what it lies in: at 95 % and by a bootstrap in a record; a comparison says by what and how surely."""

    mean: float
    low: float
    high: float

    def __neg__(self) -> Interval:
        """Of the negative values: what a less b is, as b less a."""
        return Interval(mean=-self.mean, low=-self.high, high=-self.low)

    @property
    def excludes_zero(self) -> bool:
        """Whether it lies on one side of zero."""
        return self.low > 0 or self.high < 0


class Sample(RecordModel):
    """One generated summary."""

    id: str
    article: str
    reference: str
    generated: str


class PerExample(RecordModel):
    """The scores of each held-out example, in the split's order, so that runs can be compared example by example."""

    examples_fingerprint: str
    """Digest of the examples' ids and references: runs are paired where it is the same."""
    loss: tuple[float, ...] = ()
    """Cross-entropy of each example in nats, summed over its labelled tokens."""
    labelled_tokens: tuple[int, ...] = ()
    """How many labelled tokens each has."""
    rouge: dict[str, tuple[float, ...]] = Field(default={})
    """F-measures (0 to 100) of each generated summary, by kind."""


class Quality(RecordModel):
    """How good the trained model is on held-out examples."""

    split: str
    num_examples: int
    loss: float | None = None
    """Mean cross-entropy on summary and end tokens, in nats."""
    perplexity: float | None = None
    rouge: dict[str, Interval] | None = None
    """F-measures (0 to 100) of generated summaries: rouge1, rouge2, rougeL, rougeLsum."""
    teacher_forced_argmax_rouge: dict[str, Interval] | None = None
    """The published study's figure: the reference is shown token by token. Not comparable with ``rouge``."""
    samples: tuple[Sample, ...] = ()
    per_example: PerExample | None = None
