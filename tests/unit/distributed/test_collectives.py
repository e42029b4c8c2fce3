"""Ranks run one after another, and raise the main process's error together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from peftbench.distributed.collectives import main_process_first
from peftbench.errors import DataError


def fake_accelerator(rank: int) -> Any:
    """Return a fake accelerator of one of two processes."""
    return SimpleNamespace(is_main_process=rank == 0, num_processes=2)


def test_main_process_broadcasts_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main process sends its error to the others before raising it."""
    sent: list[Any] = []

    def broadcast(items: list[Any]) -> list[Any]:
        sent.extend(items)
        return items

    monkeypatch.setattr("peftbench.distributed.collectives.broadcast_object_list", broadcast)
    error = DataError("no rows", "give some")

    def fail() -> None:
        raise error

    with pytest.raises(DataError, match="no rows; give some"):
        main_process_first(fake_accelerator(0), fail)
    assert sent == [error]


def test_other_ranks_raise_the_main_process_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that receives an error raises it without calling the function."""
    monkeypatch.setattr("peftbench.distributed.collectives.broadcast_object_list", lambda _: [DataError("no rows")])
    with pytest.raises(DataError, match="no rows"):
        main_process_first(fake_accelerator(1), lambda: pytest.fail("the function was called"))


def test_every_rank_returns_its_own_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an error, each rank calls the function itself."""
    monkeypatch.setattr("peftbench.distributed.collectives.broadcast_object_list", lambda items: items)
    assert [main_process_first(fake_accelerator(number), lambda: number) for number in (0, 1)] == [0, 1]  # noqa: B023
