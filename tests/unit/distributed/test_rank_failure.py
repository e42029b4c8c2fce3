"""A failing rank notifies the others once, and ranks wait only until the record is written."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peftbench.distributed import rank_failure
from peftbench.distributed.rank_failure import FailureChannel

FAILURE = {"outcome": {"kind": "oom"}}


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that builds a rank's channel, with a short polling interval and grace period."""
    monkeypatch.setattr(rank_failure, "broadcast_object_list", list)
    monkeypatch.setattr("peftbench.distributed.rank_failure.uuid.uuid4", lambda: SimpleNamespace(hex="this-run"))
    monkeypatch.setattr(
        rank_failure, "Heartbeat", lambda *_: SimpleNamespace(beat=int, find_lost_host=lambda *_: None, close=int)
    )
    monkeypatch.setattr(rank_failure, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(rank_failure, "_GRACE_SECONDS", 0.2)

    def build(number: int, world_size: int = 2) -> FailureChannel:
        accelerator = SimpleNamespace(process_index=number, num_processes=world_size, is_main_process=number == 0)
        return FailureChannel(accelerator, tmp_path)  # type: ignore[arg-type]

    return build


def test_failure_reaches_only_the_other_ranks(rank: Any) -> None:
    """A watching rank's callback runs once; that of the failing rank does not."""
    first, second = rank(0), rank(1)
    received: dict[str, list[Any]] = {"first": [], "second": []}
    called = threading.Event()

    def receive(failure: dict[str, Any]) -> None:
        received["first"].append(failure)
        called.set()

    first.watch(receive)
    second.watch(received["second"].append)
    second.report_failure(FAILURE)
    assert called.wait(5)
    assert received == {"first": [FAILURE], "second": []}
    assert first.read_failure() == FAILURE
    assert second.read_failure() is None


def test_no_callback_if_the_rank_ends_within_the_grace_period(rank: Any) -> None:
    """Ranks often run out of memory together, and each then writes its own record."""
    first, second = rank(0), rank(1)
    called = threading.Event()
    first.watch(lambda _: called.set())
    second.report_failure(FAILURE)
    assert not called.wait(0.1)  # the rank has read the failure and waits
    first.mark_record_written()
    assert not called.wait(0.6)


def test_only_one_thread_may_end_a_rank(rank: Any) -> None:
    """acquire_exit returns in the first thread and blocks every other one."""
    first = rank(0)
    first.acquire_exit()
    ended = threading.Event()

    def end() -> None:
        first.acquire_exit()
        ended.set()

    threading.Thread(target=end, daemon=True).start()
    assert not ended.wait(0.3)


def test_waiting_ends_when_the_record_is_written(rank: Any, tmp_path: Path) -> None:
    """The channel's files are deleted too."""
    first, second = rank(0), rank(1)
    second.report_failure(FAILURE)
    waiting = threading.Thread(target=second.wait_for_record)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    first.mark_record_written()
    waiting.join(5)
    assert not waiting.is_alive()
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_killed_run_are_ignored(rank: Any, tmp_path: Path) -> None:
    """The main process of the next run deletes them; each run uses another folder name."""
    stale = tmp_path / ".ended-before"
    stale.mkdir()
    (stale / "rank1.json").write_text('{"outcome": {}}', encoding="utf-8")
    first = rank(0)
    assert first.read_failure() is None
    assert [path.name for path in tmp_path.iterdir()] == [".ended-this-run"]
    first.mark_record_written()
    assert list(tmp_path.iterdir()) == []


def test_one_process_does_nothing(rank: Any, tmp_path: Path) -> None:
    """It writes no file, starts no thread and does not wait."""
    single = rank(0, world_size=1)
    before = threading.active_count()
    single.watch(lambda _: None)
    assert threading.active_count() == before
    single.report_failure(FAILURE)
    single.wait_for_record()
    assert single.read_failure() is None
    assert list(tmp_path.iterdir()) == []


def test_partial_file_is_read_again(rank: Any, tmp_path: Path) -> None:
    """A file that is not yet valid JSON counts as no failure."""
    first = rank(0)
    directory = tmp_path / ".ended-this-run"
    (directory / "rank1.json").write_text("{", encoding="utf-8")
    assert first.read_failure() is None
    (directory / "rank1.json").write_text('{"a": 1}', encoding="utf-8")
    assert first.read_failure() == {"a": 1}
