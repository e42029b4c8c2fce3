"""What was equal, what was not, and the commands that repeat a run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from peftbench.engine.engines import ENGINES
from peftbench.record import Device, Engine, RunRecord
from peftbench.report.knobs import commands, knobs, surroundings
from tests.report.records import record


def test_knobs_are_equal_or_counted() -> None:
    """A knob with one value is equal; another has each value with how many runs have it, and a lack of it counts."""
    rows = [record("a", "lora", 1, method={"r": 8}), record("b", "lora", 1, method={"r": 8}), record("c", "full", 1)]
    found = {knob.name: knob for knob in knobs(rows)}
    assert found["train.global_batch"].equal
    assert found["train.global_batch"].values == {"16": 3}
    assert found["method.kind"].values == {"lora": 2, "full": 1}
    assert found["method.r"].values == {"8": 2, "–": 1}
    assert "name" not in found
    assert "output_dir" not in found


def test_many_values_are_counted_and_not_listed() -> None:
    """Of a hundred values a dozen are shown, and how many more there are."""
    found = {knob.name: knob for knob in knobs([record(f"a{s}", "full", 1, seed=s) for s in range(100)])}
    seeds = found["train.seed"]
    assert len(seeds.shown) == 12
    assert seeds.more == 88


def test_surroundings_say_where_and_with_what() -> None:
    """Device, engine, versions, commit and identities; what nothing tells is unknown."""
    one = record("a", "full", 1, versions={"torch": "2"}, git="abc")
    found = {knob.name: knob.values for knob in surroundings([one])}
    assert found["torch"] == {"2": 1}
    assert found["commit"] == {"abc": 1}
    assert found["device"] == {"a CPU (cpu)": 1}
    assert found["device memory"] == {"unknown": 1}


def _engine(name: str) -> Engine:
    return Engine(
        name=name, kind="X", mixed_precision="bf16", optimizer="AdamW", micro_batch=1, accumulation=1, threads=1
    )


@pytest.mark.parametrize(
    ("engine", "device", "launcher"),
    [
        ("single", "cuda", ["python", "launch/train.py"]),
        ("ddp", "cpu", ["accelerate", "launch", "--config_file", "accel_configs/cpu2.yaml"]),
        ("zero2", "cuda", ["accelerate", "launch", "--config_file", "accel_configs/zero2.yaml"]),
    ],
)
def test_a_run_is_repeated_by_its_own_engine(engine: str, device: str, launcher: list[str]) -> None:
    """The command names the file of the engine that ran, as many processes, and the record, quoted for a shell."""
    one = record("a b", "full", 1, git="abc+changes", engine=_engine(engine))
    one = one.model_copy(update={"device": Device(kind=device, name="x", processes=2)})
    lines = commands(one, Path("runs/it's here/record.json"))
    assert lines[0].startswith("git checkout abc  # ")
    words = shlex.split(lines[-1])
    assert words[: len(launcher)] == launcher
    assert words[words.index("--config") + 1] == "runs/it's here/record.json"
    assert ("--num_processes" in words) == (engine != "single")
    assert words[-1] == "output_dir=runs_again"


REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_engine_that_a_record_may_name_has_its_file() -> None:
    """No command names a file that is not there."""
    assert len(ENGINES) >= 5
    for name in ENGINES:
        one = record("a", "full", 1, engine=_engine(name))
        for device in ("cpu", "cuda"):
            here: RunRecord = one.model_copy(update={"device": Device(kind=device, name="x", processes=2)})
            words = shlex.split(commands(here, Path("record.json"))[-1])
            if "--config_file" in words:
                assert (REPOSITORY / words[words.index("--config_file") + 1]).is_file(), (name, device)
