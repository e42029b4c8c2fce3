"""Two processes match one, and a stopped run resumes, for every type of peft and every initialization from data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peftbench.distributed.compatibility import Combination
from peftbench.record import RunRecord, read_record
from tests.distributed.battery import RESUMED
from tests.helpers.engines import launch_battery
from tests.helpers.peft_types import ALL_TYPES, COMPUTED

ENGINES_OF_TYPES = ("ddp", "zero2")
DEPENDS_ON_BATCH = {"LILY"}
"""The outputs of an example depend on the other rows of its batch, and processes divide the batch."""
DRAWS_NOISE = {"PVERA"}
"""It draws random numbers in each forward pass, which differ between processes."""

UNSUPPORTED = {("zero2", "ADALORA")}
"""It reads gradients after the optimizer's step, but DeepSpeed has deleted them by then."""
FAST = ("ddp", "OFT")
"""A point of the fast suite; one, since each worker of pytest launches the runs of its tests."""
POINTS = [
    pytest.param(engine, name, marks=() if (engine, name) == FAST else pytest.mark.slow)
    for engine in ENGINES_OF_TYPES
    for name in (*ALL_TYPES, *COMPUTED)
    if (engine, name) not in UNSUPPORTED
]

FindRun = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def find_run(folders: tuple[Path, Path, Path], request: pytest.FixtureRequest) -> FindRun:
    """Return a function that finds the run of a type on an engine, which runs all types of this session at once."""
    users = (item for item in request.session.items if "find_run" in getattr(item, "fixturenames", ()))
    names = sorted({item.callspec.params["name"] for item in users if hasattr(item, "callspec")})
    launched: set[str] = set()

    def find(engine: str, name: str) -> Path:
        if engine not in launched:
            launched.add(engine)
            supported = [one for one in names if (engine, one) not in UNSUPPORTED]
            launch_battery(engine, [Combination(one, engine, "adamw", "fp32") for one in supported], *folders)
        return folders[0] / engine / f"{name}-adamw-fp32"

    return find


def read_run(folder: Path) -> RunRecord:
    """Return the record of a run that ended as ok."""
    traceback = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*-refused.txt")))
    assert not traceback, traceback
    record = read_record(folder / "record.json")
    assert record.outcome.kind == "ok"
    return record


@pytest.mark.multiprocess
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("engine", "name"), POINTS)
def test_two_processes_match_one(engine: str, name: str, find_run: FindRun) -> None:
    """The losses of all steps are equal, and a stopped and resumed run repeats those of an uninterrupted one."""
    single, two = read_run(find_run("single", name)), read_run(find_run(engine, name))
    assert two.device.num_processes == 2
    assert two.parameters == single.parameters
    if name not in DEPENDS_ON_BATCH | DRAWS_NOISE:
        assert two.step_losses == pytest.approx(single.step_losses, rel=1e-3)
    for record, folder in ((single, find_run("single", name)), (two, find_run(engine, name))):
        resumed = read_run(folder.with_name(f"{folder.name}{RESUMED}"))
        assert resumed.resumed_after
        exact = record is single
        assert resumed.step_losses == (record.step_losses if exact else pytest.approx(record.step_losses, rel=1e-5))
