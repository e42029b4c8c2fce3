"""Hosts hear of each other, and of nobody who is only slow to be looked at."""

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
    """The time, to be set."""
    now = [1000.0]
    monkeypatch.setattr("peftbench.distributed.heartbeat.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def hosts(tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Given which ranks lead on which node, the pulses of all."""

    def made(*nodes: str, shared: bool = True) -> list[Heartbeat]:
        told = [(rank, node, f"host{node}", node not in nodes[:rank]) for rank, node in enumerate(nodes)]
        monkeypatch.setattr(heartbeat, "gathered", lambda _, value: told if isinstance(value, tuple) else value or [])
        found = []
        for rank, _, _, leads in told if shared and len(set(nodes)) > 1 else []:  # which beat at the same time
            (tmp_path / "pulse").mkdir(exist_ok=True)
            if leads:
                (tmp_path / "pulse" / f"pulse{rank}").touch()
        for rank, node, _, leads in told:
            monkeypatch.setenv("GROUP_RANK", node)
            found.append(
                Heartbeat(SimpleNamespace(process_index=rank, is_local_main_process=leads), tmp_path / "pulse")
            )  # type: ignore[arg-type]
        return found

    return made


def test_who_beats_is_there_and_who_stops_is_gone(hosts: Any, clock: list[float]) -> None:
    """After the stated time and not before; which process and which host is said."""
    first, second = hosts("0", "1")
    for _ in range(40):
        clock[0] += HEARTBEAT_INTERVAL_SECONDS
        first.beat()
        second.beat()
        assert first.lost() is None
        assert second.lost() is None
    for _ in range(int(HEARTBEAT_TIMEOUT_SECONDS / HEARTBEAT_INTERVAL_SECONDS)):
        clock[0] += HEARTBEAT_INTERVAL_SECONDS
        first.beat()
        assert first.lost() is None
        assert second.lost() is None
    clock[0] += HEARTBEAT_INTERVAL_SECONDS
    assert first.lost() == "process 1 on host1 is gone: nothing was heard of its host for 60 s"


def test_whoever_was_held_up_blames_nobody(hosts: Any, clock: list[float]) -> None:
    """A host that was suspended looks again before it says that another is gone."""
    first, _ = hosts("0", "1")
    assert first.lost() is None
    clock[0] += 10 * HEARTBEAT_TIMEOUT_SECONDS
    assert first.lost() is None
    for _ in range(int(HEARTBEAT_TIMEOUT_SECONDS / HEARTBEAT_INTERVAL_SECONDS) + 1):
        clock[0] += HEARTBEAT_INTERVAL_SECONDS
        found = first.lost()
    assert found is not None


def test_machines_that_share_no_folder(hosts: Any) -> None:
    """They could not hear of each other, and would end a run that nothing is wrong with."""
    with pytest.raises(OutputError, match="is not one folder for all machines of this run"):
        hosts("0", "1", shared=False)


def test_only_the_host_that_is_waited_for(hosts: Any, clock: list[float]) -> None:
    """Whoever waits for the main process waits on where a third is gone."""
    _, second, third = hosts("0", "1", "2")
    for _ in range(int(HEARTBEAT_TIMEOUT_SECONDS / HEARTBEAT_INTERVAL_SECONDS) + 2):
        clock[0] += HEARTBEAT_INTERVAL_SECONDS
        second.beat()
        gone = third.lost(1), third.lost(0)
    assert gone[0] is None
    assert gone[1] is not None


def test_one_file_a_host(hosts: Any, tmp_path: Path) -> None:
    """Ranks that lead on none write none, and hear of the other hosts as well; in the end nothing is left."""
    pulses = hosts("0", "0", "1", "1")
    assert sorted(path.name for path in (tmp_path / "pulse").iterdir()) == ["pulse0", "pulse2"]
    pulses[0].end()
    assert not (tmp_path / "pulse").exists()


def test_one_host_has_nobody_to_hear(hosts: Any, clock: list[float], tmp_path: Path) -> None:
    """And writes nothing."""
    first, _ = hosts("0", "0")
    clock[0] += 100 * HEARTBEAT_TIMEOUT_SECONDS
    first.beat()
    assert first.lost() is None
    assert list(tmp_path.iterdir()) == []
