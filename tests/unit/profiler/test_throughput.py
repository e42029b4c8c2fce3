"""Throughput of known steps."""

from __future__ import annotations

import pytest

from peftbench.data.collate import TokenCounts
from peftbench.profiler.throughput import compute_throughput
from peftbench.record import TokensPerSecond


def test_throughput_of_known_steps() -> None:
    """Eleven steps of 0 to 1 second in a phase of 11 seconds; building batches took half of it."""
    counts = [TokenCounts(real=110, padded=220, labeled=11, virtual=55)] * 11
    throughput = compute_throughput([n / 10 for n in range(11)], counts, train_seconds=11.0, global_batch_size=4)
    assert throughput is not None
    assert (throughput.steps, throughput.samples_per_second, throughput.data_time_fraction) == (11, 4.0, 0.5)
    quantiles = (throughput.step_seconds_p10, throughput.step_seconds_median, throughput.step_seconds_p90)
    assert quantiles == pytest.approx((0.1, 0.5, 0.9))
    assert throughput.tokens_per_second == TokensPerSecond(real=110, padded=220, labeled=11, virtual=55)


def test_no_timed_steps_is_none() -> None:
    """If all steps were warm-up, throughput is unknown."""
    assert compute_throughput([], [], train_seconds=0.0, global_batch_size=4) is None
