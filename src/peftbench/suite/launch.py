"""Runs of a suite on this machine, one after another, each in a fresh process through the one entry point."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from peftbench.common.filesystem import write_atomically
from peftbench.errors import RunLockedError
from peftbench.recipe.loader import to_commented_yaml
from peftbench.recipe.schema import Recipe
from peftbench.record import FINAL_OUTCOMES, RECORD_FILE
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.lock import is_locked, raise_if_locked
from peftbench.run_dir.results import load_existing_result
from peftbench.run_dir.stop_request import ATTEMPT_ENV, clear_stop_files, get_stop_file

ENTRY_POINT = "peftbench.train"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class RunResult:
    """How one run of a suite ended: its outcome, or "skipped", "refused" or "crashed", and why where not well."""

    name: str
    outcome: str
    error: str | None = None
    shareable_error: str | None = None
    """What a page says of it, where the error names a machine: a page is shared."""

    @property
    def succeeded(self) -> bool:
        """Whether there is a result, an out-of-memory included."""
        return self.outcome in FINAL_OUTCOMES or self.outcome == "skipped"


def run_suite(
    recipes: Sequence[Recipe], accelerate: Path | None, log_message: Callable[[str], None]
) -> list[RunResult]:
    """Run what is not finished; ``say`` is told what happens, a line at a time.

    Raises:
        KeyboardInterrupt: after the run in progress was asked to stop, and did.
    """
    results: list[RunResult] = []
    finished = {number for number, recipe in enumerate(recipes, 1) if load_existing_result(recipe) is not None}
    for number, recipe in enumerate(recipes, 1):  # so that whoever looks meanwhile is told of those that wait
        folder = RunDir.from_recipe(recipe).path
        # A record there may be of another recipe: that stays beside it until it is this one's turn.
        if number not in finished and not is_locked(folder) and not (folder / RECORD_FILE).exists():
            _write_recipe(recipe, folder)
    for number, recipe in enumerate(recipes, 1):
        place = f"[{number}/{len(recipes)}] {recipe.name}"
        if number in finished or load_existing_result(recipe) is not None:  # by another process meanwhile
            log_message(f"{place}: finished before, skipped")
            results.append(RunResult(recipe.name, "skipped"))
            continue
        log_message(f"{place}: running")
        result = run_one(recipe, accelerate, log_message=log_message)
        log_message(f"{place}: {result.outcome}" + (f" ({result.error})" if result.error else ""))
        results.append(result)
    return results


def run_one(
    recipe: Recipe,
    accelerate: Path | None,
    processes: int | None = None,
    log_message: Callable[[str], None] | None = None,
) -> RunResult:
    """One run in a process of its own, or in as many as the accelerate file or ``processes`` says.

    Its recipe is written beside its record, so that it can be run again by hand. If this process dies, the run is
    asked to stop.
    """
    folder = RunDir.from_recipe(recipe).path
    try:  # its own process would find out too, when what another has written is gone
        raise_if_locked(folder)
    except RunLockedError as error:
        return RunResult(recipe.name, "refused", str(error), f"{folder} is in use")
    recipe_file = _write_recipe(recipe, folder)
    launcher = [sys.executable]
    if accelerate is not None:
        launcher += ["-m", "accelerate.commands.launch", "--quiet", "--config_file", str(accelerate)]
        launcher += ["--num_processes", str(processes)] if processes is not None else []
    command = [*launcher, "-m", ENTRY_POINT, "--config", str(recipe_file)]
    # What asks it to stop is meant for it alone.
    environment = os.environ | {ATTEMPT_ENV: os.environ.get(ATTEMPT_ENV) or f"{socket.gethostname()}-{os.getpid()}"}
    clear_stop_files(get_stop_file(folder, environment))  # of another process of this number
    log = RunDir(folder).log_file
    # A person watches the bars; anyone else finds what was said in the run's folder.
    with (Path(os.devnull) if sys.stderr.isatty() else log).open("wb") as file:
        errors = None if sys.stderr.isatty() else file
        # In a session of its own, so that Ctrl-C reaches the run once, from here.
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            preexec_fn=_terminate_with_parent,  # noqa: PLW1509 — no thread of this process holds a lock
        )
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            if log_message is not None:
                log_message(f"{recipe.name}: is to finish its step and keep it; press Ctrl-C again to kill it")
            _stop_process(process, get_stop_file(folder, environment))
            raise
    return _parse_result(recipe.name, output, process.returncode, None if errors is None else log)


def _write_recipe(recipe: Recipe, run_dir: Path) -> Path:
    file = RunDir(run_dir).recipe_file
    write_atomically(file, to_commented_yaml(recipe))
    return file


def _terminate_with_parent() -> None:
    """In the new process, on Linux: SIGTERM when the one that started it is gone (prctl(2), PR_SET_PDEATHSIG)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _parse_result(name: str, output: str, exit_code: int, log_path: Path | None) -> RunResult:
    lines = output.strip().splitlines()
    with suppress(IndexError, ValueError, KeyError, TypeError):
        last = json.loads(lines[-1])
        return RunResult(name, str(last["outcome"]), last.get("error"))
    where = f"; see {log_path}" if log_path else ""
    reason = (
        f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"
    )
    return RunResult(name, "crashed", f"it {reason} without a result{where}")


def _stop_process(process: subprocess.Popen[str], stop_file: Path) -> None:
    """Ask a run and all its processes to stop, however long that takes; whoever is impatient has them killed."""
    try:
        write_atomically(stop_file, "SIGINT\n")
        process.communicate()
    except KeyboardInterrupt:
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(process.pid)
            for one in (*launcher.children(recursive=True), launcher):  # ranks have sessions of their own
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        process.communicate()
    finally:
        stop_file.unlink(missing_ok=True)
