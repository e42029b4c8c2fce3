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

from peftbench.config import explained
from peftbench.errors import BusyError
from peftbench.files import write_atomically
from peftbench.finished import result_of
from peftbench.lock import held, refuse_if_held
from peftbench.recipe import Recipe
from peftbench.record import FILE, FINAL
from peftbench.stop import JOB_VARIABLE, request, take_back

ENTRY_POINT = "peftbench.train"
_PDEATHSIG = 1


@dataclass(frozen=True)
class Result:
    """How one run of a suite ended: its outcome, or "skipped", "refused" or "crashed", and why where not well."""

    name: str
    outcome: str
    error: str | None = None
    shared: str | None = None
    """What a page says of it, where the error names a machine: a page is shared."""

    @property
    def well(self) -> bool:
        """Whether there is a result, an out-of-memory included."""
        return self.outcome in FINAL or self.outcome == "skipped"


def run_suite(recipes: Sequence[Recipe], accelerate: Path | None, say: Callable[[str], None]) -> list[Result]:
    """Run what is not finished; ``say`` is told what happens, a line at a time.

    Raises:
        KeyboardInterrupt: after the run in progress was asked to stop, and did.
    """
    results: list[Result] = []
    finished = {number for number, recipe in enumerate(recipes, 1) if result_of(recipe) is not None}
    for number, recipe in enumerate(recipes, 1):  # so that whoever looks meanwhile is told of those that wait
        folder = Path(recipe.output_dir) / recipe.name
        # A record there may be of another recipe: that stays beside it until it is this one's turn.
        if number not in finished and not held(folder) and not (folder / FILE).exists():
            _write_recipe(recipe, folder)
    for number, recipe in enumerate(recipes, 1):
        place = f"[{number}/{len(recipes)}] {recipe.name}"
        if number in finished or result_of(recipe) is not None:  # by another process meanwhile
            say(f"{place}: finished before, skipped")
            results.append(Result(recipe.name, "skipped"))
            continue
        say(f"{place}: running")
        result = run_one(recipe, accelerate, say=say)
        say(f"{place}: {result.outcome}" + (f" ({result.error})" if result.error else ""))
        results.append(result)
    return results


def run_one(
    recipe: Recipe, accelerate: Path | None, processes: int | None = None, say: Callable[[str], None] | None = None
) -> Result:
    """One run in a process of its own, or in as many as the accelerate file or ``processes`` says.

    Its recipe is written beside its record, so that it can be run again by hand. If this process dies, the run is
    asked to stop.
    """
    folder = Path(recipe.output_dir) / recipe.name
    try:  # its own process would find out too, when what another has written is gone
        refuse_if_held(folder)
    except BusyError as error:
        return Result(recipe.name, "refused", str(error), f"{folder} is in use")
    recipe_file = _write_recipe(recipe, folder)
    launcher = [sys.executable]
    if accelerate is not None:
        launcher += ["-m", "accelerate.commands.launch", "--quiet", "--config_file", str(accelerate)]
        launcher += ["--num_processes", str(processes)] if processes is not None else []
    command = [*launcher, "-m", ENTRY_POINT, "--config", str(recipe_file)]
    # What asks it to stop is meant for it alone.
    environment = os.environ | {JOB_VARIABLE: os.environ.get(JOB_VARIABLE) or f"{socket.gethostname()}-{os.getpid()}"}
    take_back(request(folder, environment))  # of another process of this number
    log = folder / "log.txt"
    # A person watches the bars; anyone else finds what was said in the run's folder.
    with (Path(os.devnull) if sys.stderr.isatty() else log).open("wb") as file:
        errors = None if sys.stderr.isatty() else file
        # In a session of its own, so that Ctrl-C reaches the run once, from here.
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 — no thread of this process holds a lock
        )  # fmt: skip
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            if say is not None:
                say(f"{recipe.name}: is to finish its step and keep it; press Ctrl-C again to kill it")
            _stop(process, request(folder, environment))
            raise
    return _result(recipe.name, output, process.returncode, None if errors is None else log)


def _write_recipe(recipe: Recipe, folder: Path) -> Path:
    file = folder / "recipe.yaml"
    write_atomically(file, explained(recipe))
    return file


def _end_with_parent() -> None:
    """In the new process, on Linux: SIGTERM when the one that started it is gone (prctl(2), PR_SET_PDEATHSIG)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGTERM)


def _result(name: str, output: str, code: int, log: Path | None) -> Result:
    lines = output.strip().splitlines()
    with suppress(IndexError, ValueError, KeyError, TypeError):
        last = json.loads(lines[-1])
        return Result(name, str(last["outcome"]), last.get("error"))
    where = f"; see {log}" if log else ""
    reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Result(name, "crashed", f"it {reason} without a result{where}")


def _stop(process: subprocess.Popen[str], file: Path) -> None:
    """Ask a run and all its processes to stop, however long that takes; whoever is impatient has them killed."""
    try:
        write_atomically(file, "SIGINT\n")
        process.communicate()
    except KeyboardInterrupt:
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(process.pid)
            for one in (*launcher.children(recursive=True), launcher):  # ranks have sessions of their own
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        process.communicate()
    finally:
        file.unlink(missing_ok=True)
