"""A rank that ends tells the others once, and nobody waits for what has been written."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peftbench.distributed import rank_failure
from peftbench.distributed.rank_failure import FailureChannel

WORD = {"outcome": {"kind": "oom"}}


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Given its number, one of the ranks of a run in a folder; it looks often and gives little grace."""
    monkeypatch.setattr(rank_failure, "broadcast_object_list", list)
    monkeypatch.setattr("peftbench.distributed.rank_failure.uuid.uuid4", lambda: SimpleNamespace(hex="of this run"))
    monkeypatch.setattr(rank_failure, "Pulse", lambda *_: SimpleNamespace(beat=int, lost=lambda *_: None, end=int))
    monkeypatch.setattr(rank_failure, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(rank_failure, "_GRACE_SECONDS", 0.2)

    def made(number: int, of: int = 2) -> FailureChannel:
        accelerator = SimpleNamespace(process_index=number, num_processes=of, is_main_process=number == 0)
        return FailureChannel(accelerator, tmp_path)  # type: ignore[arg-type]

    return made


def test_a_word_reaches_the_others_and_not_oneself(rank: Any) -> None:
    """The watching rank is called with it, once; the one that told it is not."""
    first, second = rank(0), rank(1)
    heard: dict[str, list[Any]] = {"first": [], "second": []}
    called = threading.Event()

    def hear(word: dict[str, Any]) -> None:
        heard["first"].append(word)
        called.set()

    first.watch(hear)
    second.watch(heard["second"].append)
    second.tell(WORD)
    assert called.wait(5)
    assert heard == {"first": [WORD], "second": []}
    assert first.heard() == WORD
    assert second.heard() is None


def test_a_rank_that_ends_in_its_grace_is_left_alone(rank: Any) -> None:
    """What one runs out of, others often do: they write their own record."""
    first, second = rank(0), rank(1)
    called = threading.Event()
    first.watch(lambda _: called.set())
    second.tell(WORD)
    assert not called.wait(0.1)  # by now it has heard, and waits
    first.recorded()
    assert not called.wait(0.6)


def test_one_thread_ends_a_rank(rank: Any) -> None:
    """Whoever claims it first goes on, and another is held until the process is gone."""
    first = rank(0)
    first.claim()
    ended = threading.Event()

    def end() -> None:
        first.claim()
        ended.set()

    threading.Thread(target=end, daemon=True).start()
    assert not ended.wait(0.3)


def test_nobody_waits_once_the_record_is_there(rank: Any, tmp_path: Path) -> None:
    """The words go with it, and with them what is waited for."""
    first, second = rank(0), rank(1)
    second.tell(WORD)
    waiting = threading.Thread(target=second.await_record)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    first.recorded()
    waiting.join(5)
    assert not waiting.is_alive()
    assert list(tmp_path.iterdir()) == []


def test_words_of_a_run_that_was_killed_are_not_heard(rank: Any, tmp_path: Path) -> None:
    """The main process of the next run takes them away, and no name is like theirs."""
    old = tmp_path / ".ended-before"
    old.mkdir()
    (old / "rank1.json").write_text('{"outcome": {}}', encoding="utf-8")
    first = rank(0)
    assert first.heard() is None
    assert [path.name for path in tmp_path.iterdir()] == [".ended-of this run"]
    first.recorded()
    assert list(tmp_path.iterdir()) == []


def test_one_process_has_nobody_to_tell(rank: Any, tmp_path: Path) -> None:
    """No file, no thread, no waiting."""
    alone = rank(0, of=1)
    before = threading.active_count()
    alone.watch(lambda _: None)
    assert threading.active_count() == before
    alone.tell(WORD)
    alone.await_record()
    assert alone.heard() is None
    assert list(tmp_path.iterdir()) == []


def test_half_a_word_is_none(rank: Any, tmp_path: Path) -> None:
    """A file that cannot be read yet is read again later."""
    first = rank(0)
    place = tmp_path / ".ended-of this run"
    (place / "rank1.json").write_text("{", encoding="utf-8")
    assert first.heard() is None
    (place / "rank1.json").write_text('{"a": 1}', encoding="utf-8")
    assert first.heard() == {"a": 1}
