"""Compute throughput from the steps timed after warm-up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy

from peftbench.record import Throughput, TokensPerSecond

if TYPE_CHECKING:
    from peftbench.data.collate import TokenCounts


def explain_untimed_run(untimed_steps: int, total_steps: int) -> str | None:
    """Return a note if no step of a run is timed, else None."""
    if untimed_steps < total_steps:
        return None
    return (
        f"profile.untimed_steps={untimed_steps} leaves none of the {total_steps} steps timed, so time, throughput and "
        "energy stay unknown"
    )


def compute_throughput(
    step_seconds: Sequence[float], token_counts: Sequence[TokenCounts], *, train_seconds: float, global_batch_size: int
) -> Throughput | None:
    """Return seconds of the timed steps, and samples and tokens of all ranks per second of the training phase.

    The phase includes the time to build batches, its steps do not. Return None if no step was timed.
    """
    if not step_seconds:
        return None
    low, median, high = (float(value) for value in numpy.quantile(step_seconds, (0.1, 0.5, 0.9)))
    return Throughput(
        steps=len(step_seconds),
        step_seconds_median=median,
        step_seconds_p10=low,
        step_seconds_p90=high,
        samples_per_second=global_batch_size * len(step_seconds) / train_seconds,
        tokens_per_second=TokensPerSecond(
            **{
                kind: sum(getattr(count, kind) for count in token_counts) / train_seconds
                for kind in TokensPerSecond.model_fields
            }
        ),
        data_time_fraction=max(0.0, 1 - sum(step_seconds) / train_seconds),
    )
