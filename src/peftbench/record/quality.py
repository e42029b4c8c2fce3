"""Quality of a model on held-out examples."""

from __future__ import annotations

from pydantic import Field

from peftbench.common.schema import RecordModel


class Interval(RecordModel):
    """A mean with its interval: a 95 % bootstrap interval in a record; comparisons state method and level."""

    mean: float
    low: float
    high: float

    def __neg__(self) -> Interval:
        """Return the interval of the negated values (a - b becomes b - a)."""
        return Interval(mean=-self.mean, low=-self.high, high=-self.low)

    @property
    def excludes_zero(self) -> bool:
        """True if both ends have the same sign."""
        return self.low > 0 or self.high < 0


MAX_SAMPLE_CHARS = 600
"""Characters of an article that a sample keeps."""


class Sample(RecordModel):
    """One generated summary."""

    id: str
    article: str
    reference: str
    generated: str


class PerExample(RecordModel):
    """Scores of each held-out example, in the order of the split, for paired comparisons."""

    examples_fingerprint: str
    """Digest of ids and references; runs are paired if it is equal."""
    loss: tuple[float, ...] = ()
    """Cross-entropy of each example in nats, summed over its labeled tokens."""
    labeled_tokens: tuple[int, ...] = ()
    """Labeled tokens of each example."""
    rouge: dict[str, tuple[float, ...]] = Field(default={})
    """F-measures (0 to 100) of each generated summary, by ROUGE type."""


class Quality(RecordModel):
    """Quality of the trained model on held-out examples."""

    split: str
    num_examples: int
    loss: float | None = None
    """Mean cross-entropy of summary and end tokens, in nats."""
    perplexity: float | None = None
    rouge: dict[str, Interval] | None = None
    """F-measures (0 to 100) of generated summaries: rouge1, rouge2, rougeL, rougeLsum."""
    teacher_forced_argmax_rouge: dict[str, Interval] | None = None
    """The published study's metric: ROUGE of teacher-forced argmax tokens. Not comparable with ``rouge``."""
    samples: tuple[Sample, ...] = ()
    per_example: PerExample | None = None
