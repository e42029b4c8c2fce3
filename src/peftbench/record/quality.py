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


PERCENT = "%"
"""Unit of a score that is a percentage."""


class ScoreDefinition(RecordModel):
    """Meaning and format of a score. A record has it, so that reports need no metric."""

    title: str
    """Name in tables and sentences, e.g. exact match."""
    description: str = ""
    """Definition for the table's column, without a period."""
    unit: str
    """Unit of the values; the title if the score has no unit of its own, e.g. BLEU."""
    digits: int = Field(ge=0)
    """Decimals in tables."""
    higher_is_better: bool
    low: float | None = None
    """Smallest possible value; None: no limit."""
    high: float | None = None
    """Largest possible value; None: no limit."""

    @property
    def axis_title(self) -> str:
        """Title with the unit."""
        return self.title if self.unit == self.title else f"{self.title} ({self.unit})"

    @property
    def difference_unit(self) -> str:
        """Unit of a difference in a sentence: "5 %" may be a relative change, "5 percentage points" cannot."""
        return "percentage points" if self.unit == PERCENT else self.unit


class Score(RecordModel):
    """One score of a model: the mean over examples with its interval, and what it means."""

    interval: Interval
    definition: ScoreDefinition


MAX_SAMPLE_CHARS = 600
"""Characters of a prompt that a sample keeps."""


class Sample(RecordModel):
    """One generated text."""

    id: str
    prompt: str
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
    metrics: dict[str, tuple[float, ...]] = Field(default={})
    """Values of each example by score name. Their mean is the score; those of a corpus-level score are jackknife
    pseudo-values.
    """


class Quality(RecordModel):
    """Quality of the trained model on held-out examples."""

    split: str
    num_examples: int
    loss: float | None = None
    """Mean cross-entropy of the labeled tokens, in nats."""
    perplexity: float | None = None
    metrics: dict[str, Score] = Field(default={})
    """Scores by name, in the order of the recipe's metrics."""
    headline_metric: str | None = None
    """Name of the score by which runs are compared; None: by held-out loss."""
    teacher_forced_metrics: dict[str, Score] = Field(default={})
    """The published study's metric: scores of teacher-forced argmax tokens. Not comparable with ``metrics``."""
    samples: tuple[Sample, ...] = ()
    per_example: PerExample | None = None

    @property
    def headline_score(self) -> Score | None:
        """Score of the headline metric; None without one."""
        return None if self.headline_metric is None else self.metrics.get(self.headline_metric)
