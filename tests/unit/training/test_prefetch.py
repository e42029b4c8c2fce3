"""Prefetching: batches are built in order, one ahead, errors are raised, and threads end."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
import torch

from peftbench.data.batches import GlobalBatch
from peftbench.training.prefetch import prefetch
from tests.helpers.batches import micro_batch, one_batch

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def fake_pin_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace pinning, which needs a GPU driver: a pinned batch has its micro-batches reversed."""
    monkeypatch.setattr(
        GlobalBatch, "pin_memory", lambda batch: GlobalBatch(batch.micro_batches[::-1], batch.token_counts)
    )


def _build_batches(count: int) -> list[GlobalBatch]:
    return [one_batch(micro_batch(seed=seed), micro_batch(seed=seed + 100)) for seed in range(count)]


def test_prefetch_yields_the_same_batches_pinned() -> None:
    """The batches keep their order, and each is pinned."""
    batches = _build_batches(5)
    prefetched = list(prefetch(iter(batches), CUDA))
    assert [batch.micro_batches for batch in prefetched] == [batch.micro_batches[::-1] for batch in batches]


def test_one_batch_is_built_ahead_by_a_thread() -> None:
    """At most one batch is built ahead, and the thread ends with the iterator."""
    num_started, threads = [0], set()

    def build() -> Iterator[GlobalBatch]:
        for batch in _build_batches(6):
            num_started[0] += 1
            threads.add(threading.current_thread())
            yield batch

    for num_used, _ in enumerate(prefetch(build(), CUDA), start=1):
        assert num_used <= num_started[0] <= num_used + 1
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_batches_are_built_on_demand_on_cpu() -> None:
    """After the first batch, the source still has the second."""
    batches = _build_batches(3)
    source = iter(batches)
    first = next(prefetch(source, torch.device("cpu")))
    assert first is batches[0]
    assert next(source) is batches[1]


def test_error_is_raised_in_place_of_its_batch() -> None:
    """The batches before it are returned first."""

    def build_two_and_fail() -> Iterator[GlobalBatch]:
        yield from _build_batches(2)
        raise ValueError("no third")

    prefetched = prefetch(build_two_and_fail(), CUDA)
    assert len(list(itertools.islice(prefetched, 2))) == 2
    with pytest.raises(ValueError, match="no third"):
        next(prefetched)
