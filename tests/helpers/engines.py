"""Engines that run on CPU, their combinations, and their launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from peftbench.distributed.compatibility import Combination, find_blocking_rule, iter_combinations
from peftbench.distributed.engines import ENGINES
from tests.helpers.paths import REPOSITORY

BATTERY = REPOSITORY / "tests" / "distributed" / "battery.py"
CONFIGS = {"single": "cpu", "ddp": "cpu2"}
PROCESSES = 2

DISTRIBUTED_ENGINES = [name for name in ENGINES if name != "single"]
"""Engines with two processes; all run on CPU."""

RunEngine = Callable[[str], Path]


def list_runnable(engine: str) -> list[Combination]:
    """Return the combinations of an engine that run on CPU according to the compatibility table."""
    return [point for point in iter_combinations(engine) if find_blocking_rule(point, "cpu") is None]


def launch_battery(engine: str, points: Sequence[Combination], folder: Path, base: Path, data: Path) -> None:
    """Run ``points`` in the processes of an engine."""
    config = REPOSITORY / "accel_configs" / f"{CONFIGS.get(engine, engine)}.yaml"
    processes = 1 if engine == "single" else PROCESSES
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--num_processes",
        str(processes),
        str(BATTERY),
        str(folder),
        str(base),
        str(data),
        engine,
        *(point.name for point in points),
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    with (folder / f"{engine}.log").open("a", encoding="utf-8") as log:
        subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment,
            check=False,
            stdout=log,
            stderr=log,
            timeout=120 + 60 * len(points),
        )
