"""A host detects lost hosts, and reports none right after it was paused itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peftbench.distributed import heartbeat
from peftbench.distributed.heartbeat import HEARTBEAT_INTERVAL_SECONDS, HEARTBEAT_TIMEOUT_SECONDS, Heartbeat
from peftbench.errors import OutputError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Monotonic time, set by the test."""
    now = [1000.0]
    monkeypatch.setattr("peftbench.distributed.heartbeat.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def hosts(tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that builds the heartbeats of all ranks, given the node of each."""

    def build(*nodes: str, shared: bool = True) -> list[Heartbeat]:
        ranks = [(rank, node, f"host{node}", node not in nodes[:rank]) for rank, node in enumerate(nodes)]
        monkeypatch.setattr(
            heartbeat, "all_gather_objects", lambda _, value: ranks if isinstance(value, tuple) else value or []
        )
        heartbeats = []
        for rank, _, _, leads in ranks if shared and len(set(nodes)) > 1 else []:  # all send at the same time
            (tmp_path / "heartbeat").mkdir(exist_ok=True)
            if leads:
                (tmp_path / "heartbeat" / f"rank{rank}").touch()
        for rank, node, _, leads in ranks:
            monkeypatch.setenv("GROUP_RANK", node)
            heartbeats.append(
                Heartbeat(SimpleNamespace(process_index=rank, is_local_main_process=leads), tmp_path / "heartbeat")
            )  # type: ignore[arg-type]
        return heartbeats

    return build


def test_silent_host_is_lost_after_the_timeout(hosts: Any, clock: list[float]) -> None:
    """It is not lost before the timeout; the message names process and host."""
    first, second = hosts("0", "1")
    for _ in range(40):
        clock[0] += HEARTBEAT_INTERVAL_SECONDS
        first.beat()
        second.beat()
        assert first.find_lost_host() is None
        assert second.find_lost_host() is None
    for _ in range(int(HEARTBEAT_TIMEOUT_SECONDS / HEARTBEAT_INTERVAL_SECONDS)):
        clock[0] += HEARTBEAT_INTERVAL_SECONDS
        first.beat()
        assert first.find_lost_host() is None
        assert second.find_lost_host() is None
    clock[0] += HEARTBEAT_INTERVAL_SECONDS
    assert first.find_lost_host() == "lost process 1 on host1: no heartbeat for 60 s"


def test_paused_host_restarts_the_timeout(hosts: Any, clock: list[float]) -> None:
    """A host that was suspended waits for the timeout again before it reports another host as lost."""
    first, _ = hosts("0", "1")
    assert first.find_lost_host() is None
    clock[0] += 10 * HEARTBEAT_TIMEOUT_SECONDS
    assert first.find_lost_host() is None
    for _ in range(int(HEARTBEAT_TIMEOUT_SECONDS / HEARTBEAT_INTERVAL_SECONDS) + 1):
        clock[0] += HEARTBEAT_INTERVAL_SECONDS
        lost_host = first.find_lost_host()
    assert lost_host is not None


def test_hosts_without_a_shared_folder_are_refused(hosts: Any) -> None:
    """Their ranks would not read each other's heartbeats and would stop a healthy run."""
    with pytest.raises(OutputError, match="is not shared by all machines of this run"):
        hosts("0", "1", shared=False)


def test_only_the_host_of_the_given_rank_is_checked(hosts: Any, clock: list[float]) -> None:
    """A rank that waits for the main process continues to wait if a third host is lost."""
    _, second, third = hosts("0", "1", "2")
    for _ in range(int(HEARTBEAT_TIMEOUT_SECONDS / HEARTBEAT_INTERVAL_SECONDS) + 2):
        clock[0] += HEARTBEAT_INTERVAL_SECONDS
        second.beat()
        lost_hosts = third.find_lost_host(1), third.find_lost_host(0)
    assert lost_hosts[0] is None
    assert lost_hosts[1] is not None


def test_one_file_per_host(hosts: Any, tmp_path: Path) -> None:
    """Only the local main process of a host writes; close deletes the files."""
    heartbeats = hosts("0", "0", "1", "1")
    assert sorted(path.name for path in (tmp_path / "heartbeat").iterdir()) == ["rank0", "rank2"]
    heartbeats[0].close()
    assert not (tmp_path / "heartbeat").exists()


def test_one_host_sends_nothing(hosts: Any, clock: list[float], tmp_path: Path) -> None:
    """With one host no file is written and no host is ever lost."""
    first, _ = hosts("0", "0")
    clock[0] += 100 * HEARTBEAT_TIMEOUT_SECONDS
    first.beat()
    assert first.find_lost_host() is None
    assert list(tmp_path.iterdir()) == []
