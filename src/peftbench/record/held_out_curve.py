"""Held-out loss during training, and loss on a general text before and after it."""

from __future__ import annotations

import math

from pydantic import Field

from peftbench.common.schema import RecordModel


class HeldOutPoint(RecordModel):
    """One evaluation during training."""

    step: int
    """Completed optimizer steps."""
    loss: float
    """Mean cross-entropy of the labeled tokens of the split, in nats."""
    seconds: float
    """Duration of the evaluation, in no measurement of the training."""
    metrics: dict[str, float] = Field(default={})
    """Means of the metrics of generated texts, by score; empty without ``evaluate.interval_metrics``."""


class HeldOutCurve(RecordModel):
    """Evaluations during training, in the order of steps."""

    split: str
    num_examples: int
    points: tuple[HeldOutPoint, ...] = ()
    kept_step: int | None = None
    """Step whose weights are saved and evaluated, with ``checkpoint.keep_best``; None: those of the last step."""

    @property
    def best_step(self) -> int | None:
        """Step with the lowest loss, the first of equal ones; None before the first finite loss."""
        return self.find_best_step(math.inf)

    def find_best_step(self, last_step: float) -> int | None:
        """Return the step with the lowest loss of all evaluations up to ``last_step``."""
        finite = [point for point in self.points if point.step <= last_step and math.isfinite(point.loss)]
        return min(finite, key=lambda point: point.loss).step if finite else None

    def count_without_improvement(self, min_delta: float) -> int:
        """Return the number of latest evaluations in a row without improvement.

        An improvement is more than ``min_delta`` below the lowest loss before it, as in transformers'
        EarlyStoppingCallback.
        """
        lowest, count = math.inf, 0
        for point in self.points:
            count = 0 if lowest - point.loss > min_delta else count + 1
            lowest = min(lowest, point.loss) if math.isfinite(point.loss) else lowest
        return count

    def with_point(self, point: HeldOutPoint) -> HeldOutCurve:
        """Return a copy with one more evaluation."""
        return self.model_copy(update={"points": (*self.points, point)})


class Forgetting(RecordModel):
    """Loss on a general text before and after training: what the training did to the model's other abilities."""

    text: str
    """Value of ``evaluate.general_text``."""
    text_fingerprint: str
    """Digest of the text."""
    window_tokens: int
    """Most tokens of a window; each window is predicted without the one before it."""
    num_tokens: int
    """Predicted tokens, in the model's own vocabulary."""
    loss_before: float | None = None
    """Mean cross-entropy of the base model as loaded, in nats per token; None if it was not measured."""
    loss_after: float | None = None
    """Mean cross-entropy of the trained model, in nats per token; None before it is evaluated."""

    @property
    def increase(self) -> float | None:
        """Loss after minus loss before, in nats per token; None if one is unknown."""
        return None if self.loss_before is None or self.loss_after is None else self.loss_after - self.loss_before
