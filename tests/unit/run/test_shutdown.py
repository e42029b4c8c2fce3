"""Stop requests by signal and by file: after the step during training, at once in any other stage."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftbench.common.filesystem import write_atomically
from peftbench.run.shutdown import SHUTDOWN_SIGNALS, ShutdownSignal, StopRequested
from peftbench.run_dir.stop_request import ATTEMPT_ENV, clear_stop_files, get_stop_file


@pytest.fixture
def shutdown_signal() -> Iterator[ShutdownSignal]:
    """Install the signal handlers and return their object; restore the previous handlers afterwards."""
    previous_handlers = {number: signal.getsignal(number) for number in SHUTDOWN_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
    shutdown_signal = ShutdownSignal()
    shutdown_signal.install_handlers()
    yield shutdown_signal
    for number, handler in previous_handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SHUTDOWN_SIGNALS)
def test_signal_outside_training_stops_at_once(number: signal.Signals, shutdown_signal: ShutdownSignal) -> None:
    """A signal raises StopRequested with its name."""
    with pytest.raises(StopRequested) as caught:
        signal.raise_signal(number)
    assert caught.value.reason == shutdown_signal.reason == number.name


@pytest.mark.parametrize("number", SHUTDOWN_SIGNALS)
def test_signal_during_training_is_deferred(number: signal.Signals, shutdown_signal: ShutdownSignal) -> None:
    """A signal sets the reason, for the check after the step; an unchecked request raises at the end of training."""
    reasons: list[str | None] = []
    with pytest.raises(StopRequested), shutdown_signal.defer_to_step_end():  # noqa: PT012
        signal.raise_signal(number)
        reasons.append(shutdown_signal.reason)
    assert reasons == [number.name]


def test_second_ctrl_c_interrupts_a_step(shutdown_signal: ShutdownSignal) -> None:
    """A second SIGTERM does not interrupt the step, because launchers send it twice."""
    finished = []
    with pytest.raises(StopRequested), shutdown_signal.defer_to_step_end():  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        finished.append("step")
        signal.raise_signal(signal.SIGINT)
        finished.append("another step")
    assert finished == ["step"]


def test_signal_while_the_record_is_written_is_deferred(shutdown_signal: ShutdownSignal) -> None:
    """After ``defer`` a signal only sets the reason."""
    shutdown_signal.defer()
    signal.raise_signal(signal.SIGTERM)
    assert shutdown_signal.reason == "SIGTERM"


def test_resume_raises_a_deferred_request(shutdown_signal: ShutdownSignal) -> None:
    """A request that came while requests were deferred is raised at once, and later ones immediately."""
    shutdown_signal.defer()
    shutdown_signal.resume()
    shutdown_signal.defer()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(StopRequested):
        shutdown_signal.resume()
    with pytest.raises(StopRequested):
        signal.raise_signal(signal.SIGTERM)


def test_training_without_a_request_ends_normally(shutdown_signal: ShutdownSignal) -> None:
    """Nothing is raised and there is no reason."""
    with shutdown_signal.defer_to_step_end():
        pass
    assert shutdown_signal.reason is None


@pytest.mark.parametrize(("text", "reason"), [("SIGUSR1\n", "SIGUSR1"), ("", ".stop")])
def test_stop_file_requests_a_stop(text: str, reason: str, tmp_path: Path, shutdown_signal: ShutdownSignal) -> None:
    """The reason is the text of the file, or its name if the file is empty."""
    file = get_stop_file(tmp_path, {})
    shutdown_signal.watch_files(file)
    threading.Timer(0.2, lambda: write_atomically(file, text)).start()
    deadline = time.monotonic() + 20
    with pytest.raises(StopRequested), shutdown_signal.defer_to_step_end():  # noqa: PT012
        while shutdown_signal.reason is None and time.monotonic() < deadline:
            time.sleep(0.05)
    assert shutdown_signal.reason == reason


def test_each_attempt_has_its_own_stop_file(tmp_path: Path) -> None:
    """The name contains the job id and the number of the attempt."""
    environments: list[dict[str, str]] = [{}, {ATTEMPT_ENV: "7-0"}, {ATTEMPT_ENV: "7-1"}, {ATTEMPT_ENV: "8-0"}]
    names = {get_stop_file(tmp_path, environment).name for environment in environments}
    assert names == {".stop", ".stop-7-0", ".stop-7-1", ".stop-8-0"}


def test_clear_stop_files_ignores_missing_files(tmp_path: Path) -> None:
    """Existing files are deleted."""
    file = get_stop_file(tmp_path, {})
    file.touch()
    clear_stop_files(file, tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_stop_request_is_a_keyboard_interrupt() -> None:
    """Code that does not catch Ctrl-C does not catch a stop request either."""
    assert issubclass(StopRequested, KeyboardInterrupt)


def test_ignored_hangup_stays_ignored() -> None:
    """Under nohup a closed terminal does not stop the run."""
    previous_handlers = {number: signal.getsignal(number) for number in SHUTDOWN_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    shutdown_signal = ShutdownSignal()
    shutdown_signal.install_handlers()
    signal.raise_signal(signal.SIGHUP)
    assert shutdown_signal.reason is None
    for number, handler in previous_handlers.items():
        signal.signal(number, handler)
