"""Run a suite on this machine: one run after another, each in a new process of ``peftbench.train``."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from peftbench.common.filesystem import write_atomically
from peftbench.common.units import format_duration
from peftbench.errors import RunLockedError
from peftbench.recipe.loader import to_commented_yaml
from peftbench.recipe.schema import Recipe
from peftbench.record import FINAL_OUTCOMES, RECORD_FILE
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.lock import is_locked, raise_if_locked
from peftbench.run_dir.refusal import Refusal, delete_refusal, write_refusal
from peftbench.run_dir.stop_request import ATTEMPT_ENV, clear_stop_files, get_stop_file
from peftbench.suite.results import ResultFinder

ENTRY_POINT = "peftbench.train"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class RunResult:
    """Result of one run of a suite: its outcome, "skipped", "refused" or "crashed"; the error, unless it succeeded."""

    name: str
    outcome: str
    error: str | None = None
    shareable_error: str | None = None
    """The error for a page, which may be shared: without the host's name. None if ``error`` has no host name."""

    @property
    def succeeded(self) -> bool:
        """True if the run has a result; out of memory is one."""
        return self.outcome in FINAL_OUTCOMES or self.outcome == "skipped"


def run_suite(
    recipes: Sequence[Recipe], accelerate: Path | None, log_message: Callable[[str], None]
) -> list[RunResult]:
    """Run all unfinished recipes; ``log_message`` receives one line per event.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after the current run has stopped.
    """
    results: list[RunResult] = []
    existing = ResultFinder(accelerate)
    finished = {number for number, recipe in enumerate(recipes, 1) if existing.find_existing_result(recipe) is not None}
    for number, recipe in enumerate(recipes, 1):  # lists the waiting runs in ``peftbench status``
        folder = RunDir.from_recipe(recipe).path
        if not is_locked(folder):
            delete_refusal(folder)
        # A record of a changed recipe keeps its own recipe file until the run starts.
        if number not in finished and not is_locked(folder) and not (folder / RECORD_FILE).exists():
            _write_recipe(recipe, folder)
    for number, recipe in enumerate(recipes, 1):
        label = f"[{number}/{len(recipes)}] {recipe.name}"
        if number in finished or existing.find_existing_result(recipe) is not None:  # finished by another process
            log_message(f"{label}: finished before, skipped")
            results.append(RunResult(recipe.name, "skipped"))
            continue
        log_message(f"{label}: running")
        start = time.monotonic()
        result = run_one(recipe, accelerate, log_message=log_message)
        error = f" ({result.error})" if result.error else ""
        log_message(f"{label}: {result.outcome} after {format_duration(time.monotonic() - start)}{error}")
        if result.outcome == "crashed":
            _keep_crash(recipe, result)
        results.append(result)
    return results


def _keep_crash(recipe: Recipe, result: RunResult) -> None:
    """Write the error of a run that crashed before it wrote any file; after that, its own files have its state."""
    run_dir = RunDir.from_recipe(recipe)
    if not run_dir.status_file.exists() and not run_dir.record_file.exists():
        write_refusal(run_dir.path, Refusal(outcome="crashed", error=str(result.error)))


def run_one(
    recipe: Recipe,
    accelerate: Path | None,
    processes: int | None = None,
    log_message: Callable[[str], None] | None = None,
) -> RunResult:
    """Run one recipe in a new process, or in the number of processes given by ``processes`` or the accelerate config.

    The recipe is written to the run's folder, so that the run can be repeated by hand. If this process dies, the run
    receives SIGTERM.
    """
    folder = RunDir.from_recipe(recipe).path
    try:  # the new process would check too, but only after the recipe file was overwritten
        raise_if_locked(folder)
    except RunLockedError as error:
        return RunResult(recipe.name, "refused", str(error), f"{folder} is in use")
    recipe_file = _write_recipe(recipe, folder)
    launcher = [sys.executable]
    if accelerate is not None:
        launcher += ["-m", "accelerate.commands.launch", "--quiet", "--config_file", str(accelerate)]
        launcher += ["--num_processes", str(processes)] if processes is not None else []
    command = [*launcher, "-m", ENTRY_POINT, "--config", str(recipe_file)]
    # The attempt's name makes the stop file valid for this run alone.
    environment = os.environ | {ATTEMPT_ENV: os.environ.get(ATTEMPT_ENV) or f"{socket.gethostname()}-{os.getpid()}"}
    clear_stop_files(get_stop_file(folder, environment))  # left by an earlier process with the same number
    log = RunDir(folder).log_file
    # On a terminal the progress bar is shown; otherwise standard error goes to the run's log file.
    with (Path(os.devnull) if sys.stderr.isatty() else log).open("wb") as file:
        errors = None if sys.stderr.isatty() else file
        # A new session, so that Ctrl-C does not reach the run directly: this process requests the stop.
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            preexec_fn=_terminate_with_parent,  # noqa: PLW1509 — no thread of this process holds a lock
        )
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            if log_message is not None:
                log_message(
                    f"{recipe.name}: finishing the current step and saving a checkpoint. Press Ctrl-C again to abort."
                )
            _stop_process(process, get_stop_file(folder, environment))
            raise
    return _parse_result(recipe.name, output, process.returncode, None if errors is None else log)


def _write_recipe(recipe: Recipe, run_dir: Path) -> Path:
    file = RunDir(run_dir).recipe_file
    write_atomically(file, to_commented_yaml(recipe))
    return file


def _terminate_with_parent() -> None:
    """In the new process on Linux: send SIGTERM to it when its parent dies (prctl(2), PR_SET_PDEATHSIG)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _parse_result(name: str, output: str, exit_code: int, log_path: Path | None) -> RunResult:
    lines = output.strip().splitlines()
    with suppress(IndexError, ValueError, KeyError, TypeError):
        last = json.loads(lines[-1])
        return RunResult(name, str(last["outcome"]), last.get("error"))
    hint = f"; see {log_path}" if log_path else ""
    reason = (
        f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"
    )
    return RunResult(name, "crashed", f"the process {reason} without a result{hint}")


def _stop_process(process: subprocess.Popen[str], stop_file: Path) -> None:
    """Request a run's stop and wait until it has ended; on a second Ctrl-C kill all its processes."""
    try:
        write_atomically(stop_file, "SIGINT\n")
        process.communicate()
    except KeyboardInterrupt:
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(process.pid)
            for child in (*launcher.children(recursive=True), launcher):  # each rank has its own session
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        process.communicate()
    finally:
        stop_file.unlink(missing_ok=True)
