"""Arguments and options that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

BudgetOption = Annotated[
    Optional[str],
    typer.Option(
        help="Memory limit of each process, e.g. 16GiB. Default: the recipe key budget.memory; if it is not set, the "
        "memory of --device."
    ),
]
DeviceOption = Annotated[
    Optional[str],
    typer.Option(
        help="Device to plan for, e.g. t4, a10g, h100 or cpu, or a file of peftbench calibrate. Default: a generic GPU "
        "of unknown memory size."
    ),
]
AccelerateOption = Annotated[
    Optional[str],
    typer.Option(
        "--accelerate",
        metavar="CONFIG",
        help="Accelerate config: a file, or the name of one in accel_configs/, e.g. zero2. Default: the one that "
        "the suite names, otherwise a single process.",
    ),
]
"""Results of ``estimate`` and ``fit`` are per process."""
ProcessesOption = Annotated[
    Optional[int], typer.Option(min=1, help="Number of processes. Default: the number in the accelerate config.")
]
SeedsOption = Annotated[
    Optional[int],
    typer.Option(
        min=1, help="Train each method N times, with seeds train.seed, train.seed + 1 and so on. Baselines run once."
    ),
]
OutOption = Annotated[
    Optional[Path],
    typer.Option(help="Output folder; each run gets its own subfolder. Default: the recipe key output_dir."),
]
UpdateFileOption = Annotated[
    Optional[Path],
    typer.Option(help="Write the table to this Markdown file, in the section named by --marker."),
]
JsonOption = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")]


def print_progress(line: str) -> None:
    """Print a line about long work, if someone watches."""
    if sys.stderr.isatty():
        print_to_stderr(line)


def print_to_stderr(line: str) -> None:
    """Print a line that is not part of a command's result."""
    print(line, file=sys.stderr, flush=True)
