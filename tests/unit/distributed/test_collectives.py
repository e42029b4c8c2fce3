"""Ranks do things one after another, and refuse together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from peftbench.distributed.collectives import main_process_first
from peftbench.errors import DataError


def rank(number: int) -> Any:
    """What is asked of an accelerator, for one of two processes."""
    return SimpleNamespace(is_main_process=number == 0, num_processes=2)


def test_the_main_process_tells_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake that the main process finds is sent to the others before it is raised, whole."""
    sent: list[Any] = []

    def broadcast(items: list[Any]) -> list[Any]:
        sent.extend(items)
        return items

    monkeypatch.setattr("peftbench.distributed.collectives.broadcast_object_list", broadcast)
    mistake = DataError("no rows", "give some")

    def work() -> None:
        raise mistake

    with pytest.raises(DataError, match="no rows; give some"):
        main_process_first(rank(0), work)
    assert sent == [mistake]


def test_the_others_refuse_as_the_main_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is told of a mistake raises it and does not begin, whatever it would have found itself."""
    monkeypatch.setattr("peftbench.distributed.collectives.broadcast_object_list", lambda _: [DataError("no rows")])
    with pytest.raises(DataError, match="no rows"):
        main_process_first(rank(1), lambda: pytest.fail("it began"))


def test_the_others_go_on_when_it_went_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank has the result of its own work."""
    monkeypatch.setattr("peftbench.distributed.collectives.broadcast_object_list", lambda items: items)
    assert [main_process_first(rank(number), lambda: number) for number in (0, 1)] == [0, 1]  # noqa: B023
