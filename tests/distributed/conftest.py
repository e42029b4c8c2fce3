"""Fixtures that launch each engine once for all its combinations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peftbench.data.sources import Files
from peftbench.distributed.compatibility import Combination
from tests.distributed.battery import UNTRAINED
from tests.helpers.engines import RunEngine, launch_battery, list_runnable


@pytest.fixture(scope="session")
def folders(
    base_folder: Callable[[str], Path], corpus: Files, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """Return the folders of the runs, the base model and the data."""
    assert isinstance(corpus.train, str)
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
                pairs = sorted({(p.method, p.precision) for p in selected})  # a saved base has the precision's type
                points += [Combination(method, "single", UNTRAINED, precision) for method, precision in pairs]
            launch_battery(engine, points, *folders)
        return folders[0] / engine

    return run
