"""A run hears that it is to stop: by each signal and by a file, between steps while it trains and at once elsewhere."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftbench.common.filesystem import write_atomically
from peftbench.run.shutdown import SHUTDOWN_SIGNALS, ShutdownSignal, StopRequested
from peftbench.run_dir.stop_request import ATTEMPT_ENV, get_stop_file


@pytest.fixture
def stop() -> Iterator[ShutdownSignal]:
    """One that listens, in whose place the handlers before come back."""
    before = {number: signal.getsignal(number) for number in SHUTDOWN_SIGNALS}
    made = ShutdownSignal()
    made.install_handlers()
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SHUTDOWN_SIGNALS)
def test_elsewhere_it_stops_at_once(number: signal.Signals, stop: ShutdownSignal) -> None:
    """While nothing is trained there is no step to finish."""
    with pytest.raises(StopRequested) as caught:
        signal.raise_signal(number)
    assert caught.value.reason == stop.reason == number.name


@pytest.mark.parametrize("number", SHUTDOWN_SIGNALS)
def test_a_step_is_not_broken_off(number: signal.Signals, stop: ShutdownSignal) -> None:
    """Within a training it is noted, for whoever asks after a step; if nobody does, it stops afterwards."""
    after: list[str | None] = []
    with pytest.raises(StopRequested), stop.defer_to_step_end():  # noqa: PT012
        signal.raise_signal(number)
        after.append(stop.reason)
    assert after == [number.name]


def test_whoever_is_impatient(stop: ShutdownSignal) -> None:
    """A second Ctrl-C breaks a step off; a second SIGTERM, as launchers send them, does not."""
    done = []
    with pytest.raises(StopRequested), stop.defer_to_step_end():  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        done.append("the step")
        signal.raise_signal(signal.SIGINT)
        done.append("more")
    assert done == ["the step"]


def test_a_record_is_written_to_its_end(stop: ShutdownSignal) -> None:
    """What is left to be done is done."""
    stop.defer()
    signal.raise_signal(signal.SIGTERM)
    assert stop.reason == "SIGTERM"


def test_nobody_asked(stop: ShutdownSignal) -> None:
    """A training that nobody stops ends as ever."""
    with stop.defer_to_step_end():
        pass
    assert stop.reason is None


@pytest.mark.parametrize(("text", "by"), [("SIGUSR1\n", "SIGUSR1"), ("", ".stop")])
def test_a_file_asks(text: str, by: str, tmp_path: Path, stop: ShutdownSignal) -> None:
    """Soon after it is there, the process is asked, by what the file says."""
    file = get_stop_file(tmp_path, {})
    stop.watch_files(file)
    threading.Timer(0.2, lambda: write_atomically(file, text)).start()
    until = time.monotonic() + 20
    with pytest.raises(StopRequested), stop.defer_to_step_end():  # noqa: PT012
        while stop.reason is None and time.monotonic() < until:
            time.sleep(0.05)
    assert stop.reason == by


def test_another_attempts_file_asks_nothing(tmp_path: Path) -> None:
    """Each attempt of a job has a file of its own, and a run by hand another."""
    names = {
        get_stop_file(tmp_path, environment).name
        for environment in (
            {},
            {ATTEMPT_ENV: "7-0"},
            {ATTEMPT_ENV: "7-1"},
            {ATTEMPT_ENV: "8-0"},
        )
    }
    assert names == {".stop", ".stop-7-0", ".stop-7-1", ".stop-8-0"}


def test_it_is_an_interrupt() -> None:
    """So that whatever lets Ctrl-C through lets it through."""
    assert issubclass(StopRequested, KeyboardInterrupt)
    assert os.name == "posix"
