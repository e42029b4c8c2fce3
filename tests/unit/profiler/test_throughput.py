"""Throughput of known steps."""

from __future__ import annotations

import pytest

from peftbench.data.collate import TokenCounts
from peftbench.profiler.throughput import compute_throughput
from peftbench.record import TokensPerSecond


def test_figures_of_known_steps() -> None:
    """Eleven steps of 0 to 10 tenths of a second, in a phase of 11 seconds, of which half was making batches."""
    counts = [TokenCounts(real=110, padded=220, labelled=11, virtual=55)] * 11
    found = compute_throughput([n / 10 for n in range(11)], counts, train_seconds=11.0, global_batch_size=4)
    assert found is not None
    assert (found.steps, found.samples_per_second, found.data_time_fraction) == (11, 4.0, 0.5)
    quantiles = (found.step_seconds_p10, found.step_seconds_median, found.step_seconds_p90)
    assert quantiles == pytest.approx((0.1, 0.5, 0.9))
    assert found.tokens_per_second == TokensPerSecond(real=110, padded=220, labelled=11, virtual=55)


def test_no_timed_step_is_no_figure() -> None:
    """Where all steps were warm-up, throughput is not known."""
    assert compute_throughput([], [], train_seconds=0.0, global_batch_size=4) is None
