"""Fixtures that launch each engine once for all its combinations."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from peftbench.data.sources import Files
from peftbench.distributed.compatibility import Combination, find_blocking_rule, iter_combinations
from peftbench.distributed.engines import ENGINES
from tests.distributed.battery import UNTRAINED
from tests.helpers.paths import REPOSITORY

BATTERY = REPOSITORY / "tests" / "distributed" / "battery.py"
CONFIGS = {"single": "cpu", "ddp": "cpu2"}
PROCESSES = 2

RunEngine = Callable[[str], Path]


def list_runnable(engine: str) -> list[Combination]:
    """Return the combinations of an engine that run on CPU according to the compatibility table."""
    return [point for point in iter_combinations(engine) if find_blocking_rule(point, "cpu") is None]


def launch(engine: str, points: Sequence[Combination], folder: Path, base: Path, data: Path) -> None:
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
            command, cwd=REPOSITORY, env=environment, check=False, stdout=log, stderr=log, timeout=60 + 30 * len(points)
        )


@pytest.fixture(scope="session")
def folders(
    base_folder: Callable[[str], Path], corpus: Files, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """Return the folders of the runs, the base model and the data."""
    assert corpus.train is not None
    return tmp_path_factory.mktemp("engines"), base_folder("gpt2_tied"), Path(corpus.train).parent


@pytest.fixture(scope="session")
def run_engine(folders: tuple[Path, Path, Path], request: pytest.FixtureRequest) -> RunEngine:
    """Return a function that runs an engine's combinations of this session once, and returns the folder of the runs."""
    users = (item for item in request.session.items if "run_engine" in getattr(item, "fixturenames", ()))
    selected = {item.callspec.params["point"] for item in users if hasattr(item, "callspec")}
    launched: set[str] = set()

    def run(engine: str) -> Path:
        if engine not in launched:
            launched.add(engine)
            points = [p for p in list_runnable(engine) if engine != "single" and p in selected]
            if engine == "single":
                names = {point.name for point in selected if point.optimizer != "deepspeed_cpu_adam"}
                names |= {p.name.replace("deepspeed_cpu_adam", "adamw") for p in selected}
                points = [p for p in list_runnable("single") if p.name in names]
                points += [Combination(method, "single", UNTRAINED, "fp32") for method in {p.method for p in selected}]
            launch(engine, points, *folders)
        return folders[0] / engine

    return run


DISTRIBUTED_ENGINES = [name for name in ENGINES if name != "single"]
"""Engines with two processes; all run on CPU."""
