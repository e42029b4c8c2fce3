"""Batches are made ahead: in order, one at a time, errors and all, and nothing is left behind."""

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
def pinned_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is pinned needs a driver; here a batch only notes that it was asked to be."""
    monkeypatch.setattr(
        GlobalBatch, "pin_memory", lambda batch: GlobalBatch(batch.micro_batches[::-1], batch.token_counts)
    )


def _made(count: int) -> list[GlobalBatch]:
    return [one_batch(micro_batch(seed=seed), micro_batch(seed=seed + 100)) for seed in range(count)]


def test_the_same_batches_in_the_same_order() -> None:
    """Each as it was made, and put into pinned memory."""
    made = _made(5)
    found = list(prefetch(iter(made), CUDA))
    assert [batch.micro_batches for batch in found] == [batch.micro_batches[::-1] for batch in made]


def test_one_is_made_while_another_is_used() -> None:
    """By another thread, and never more than one ahead."""
    started, makers = [0], set()

    def making() -> Iterator[GlobalBatch]:
        for batch in _made(6):
            started[0] += 1
            makers.add(threading.current_thread())
            yield batch

    for used, _ in enumerate(prefetch(making(), CUDA), start=1):
        assert used <= started[0] <= used + 1
    assert threading.main_thread() not in makers
    assert not any(thread.is_alive() for thread in makers)


def test_on_cpu_they_are_made_when_they_are_asked_for() -> None:
    """By whoever asks."""
    made = _made(3)
    source = iter(made)
    first = next(prefetch(source, torch.device("cpu")))
    assert first is made[0]
    assert next(source) is made[1]


def test_an_error_comes_where_its_batch_would() -> None:
    """And after the batches before it."""

    def failing() -> Iterator[GlobalBatch]:
        yield from _made(2)
        raise ValueError("no third")

    found = prefetch(failing(), CUDA)
    assert len(list(itertools.islice(found, 2))) == 2
    with pytest.raises(ValueError, match="no third"):
        next(found)
