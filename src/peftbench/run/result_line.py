"""The last line on standard output: one JSON object with the outcome of a run. Needs no torch."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, NoReturn, TextIO

from peftbench.distributed import launcher_env

if TYPE_CHECKING:
    from pathlib import Path

    from peftbench.record import Outcome


def is_main_process() -> bool:
    """True in the process with rank 0; known before any engine has started."""
    return launcher_env.get_rank() == 0


def build_result_line(name: str, outcome: Outcome, record_path: Path | None) -> dict[str, object]:
    """Return the content of the line for a run that ended with ``outcome``."""
    return {
        "outcome": outcome.kind,
        "record": None if record_path is None else str(record_path),
        "name": name,
        "error": outcome.error,
        "suggestion": outcome.suggestion,
    }


def print_result_line(result: dict[str, object], file: TextIO | None = None) -> None:
    """Print the line, on the main process only."""
    if is_main_process():
        print(json.dumps({key: value for key, value in result.items() if value is not None}), flush=True, file=file)


def exit_immediately(exit_code: int) -> NoReturn:
    """End the process without closing its process group, which would wait for the other ranks."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.flush()
    os._exit(exit_code)
