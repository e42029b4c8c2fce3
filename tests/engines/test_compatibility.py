"""The compatibility table: what it says runs does, what it refuses is refused, and the page is made from it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftbench.engine.compatibility import RULES, Combination, check, combinations, markdown, refusal
from peftbench.engine.deepspeed import check_disk
from peftbench.engine.engines import ENGINES
from peftbench.errors import CombinationError, EngineError
from peftbench.methods import METHODS
from peftbench.optim import OPTIMIZERS
from peftbench.record import RunRecord, read_record
from tests.conftest import REPOSITORY
from tests.engines.battery import RESUMED, STEPS, UNTRAINED
from tests.engines.conftest import SEVERAL, Ran, runnable
from tests.engines.tolerances import moved_apart, resumed_apart, tolerance

PAGE = REPOSITORY / "docs" / "reference" / "compatibility.md"
SLICE = [
    point for engine in ("ddp", "zero2", "zero3", "fsdp2") for point in runnable(engine)
    if (point.optimizer, point.precision) == ("adamw", "fp32")
]  # fmt: skip
ALL = [point for engine in SEVERAL for point in runnable(engine)]
REST = [point for point in ALL if point not in SLICE]
ALONE = [
    point for point in runnable("single")
    if not any(refusal(dataclasses.replace(point, engine=engine), "cpu") is None for engine in SEVERAL)
]  # fmt: skip
"""What runs in one process only."""
REFUSED = [point for point in combinations() if refusal(point, "cpu") is not None]


def test_the_table_is_whole() -> None:
    """Every combination is either run or refused, every engine runs each method, and no rule is idle."""
    assert len(list(combinations())) == len(METHODS) * len(ENGINES) * len(OPTIMIZERS) * 3
    assert {point.optimizer for point in ALONE} == {"adamw_bf16", "adamw8bit_bf16"}
    assert {(p.engine, p.method) for p in ALL} == {(engine, method) for engine in SEVERAL for method in METHODS}
    assert set(SLICE) < set(ALL)
    found = {refusal(point, device) for point in combinations() for device in ("cpu", "cuda")}
    assert found == {None, *RULES}


@pytest.mark.parametrize("point", REFUSED, ids=lambda point: f"{point.engine}-{point.name}")
def test_what_is_refused_is_told_why_and_what_to_do(point: Combination) -> None:
    """One sentence with the reason and something that does run."""
    rule = refusal(point, "cpu")
    assert rule is not None
    with pytest.raises(CombinationError) as raised:
        check(point, "cpu")
    assert rule.reason in str(raised.value)
    assert rule.instead in str(raised.value)


def test_the_page_is_made_from_the_table() -> None:
    """What the page says is what the table says now: make docs."""
    assert PAGE.read_text(encoding="utf-8") == markdown()


def held_against_one_process(point: Combination, ran: Ran) -> None:
    """The run ended well, its loss fell, and losses, states and weights are those of one process."""
    if ENGINES[point.engine].on_disk:
        _skip_without_libaio()
    record, folder = _record(ran(point.engine), point)
    assert record.outcome.kind == "ok"
    assert record.engine is not None
    assert record.engine.name == point.engine
    assert record.device.processes == 2
    alone, reference = _record(
        ran("single"),
        Combination(point.method, "single", point.optimizer.replace("deepspeed_cpu_adam", "adamw"), point.precision),
    )
    allowed = tolerance(point)
    assert record.losses[-1] < record.losses[0]
    assert record.losses == pytest.approx(alone.losses, rel=allowed)
    assert record.quality is not None
    assert alone.quality is not None
    assert record.quality.loss == pytest.approx(alone.quality.loss, rel=allowed)
    assert (record.flops.required, record.tokens) == (alone.flops.required, alone.tokens)
    for states in record.state_bytes_by_rank:
        assert states.expected_optimizer == states.optimizer + states.offloaded
    untrained = ran("single") / f"{point.method}-{UNTRAINED}-fp32"
    assert _distance(folder, reference) < moved_apart(point) * _distance(reference, untrained)
    if not ENGINES[point.engine].on_disk:
        _goes_on(record, folder, resumed_apart(point))


def _skip_without_libaio() -> None:
    try:
        check_disk()
    except EngineError as error:
        pytest.skip(str(error))


def _goes_on(record: RunRecord, folder: Path, allowed: float) -> None:
    """Stopped after a checkpoint and launched again: the same losses, step by step, and the same weights."""
    resumed = read_record(folder.with_name(f"{folder.name}{RESUMED}") / "record.json")
    assert resumed.outcome.kind == "ok"
    assert resumed.resumed_after == (STEPS // 2,)
    assert resumed.quality is not None
    assert record.quality is not None
    assert resumed.losses == pytest.approx(record.losses, rel=allowed, abs=0)
    assert resumed.quality.loss == pytest.approx(record.quality.loss, rel=allowed, abs=0)
    assert (resumed.tokens, resumed.flops) == (record.tokens, record.flops)
    assert _distance(folder.with_name(f"{folder.name}{RESUMED}"), folder) <= allowed * _size(folder)


def _record(folder: Path, point: Combination) -> tuple[RunRecord, Path]:
    place = folder / point.name
    said = "".join(path.read_text(encoding="utf-8") for path in sorted(place.glob("*-refused.txt")))
    assert (place / "record.json").exists(), said or f"no record: {(folder.parent / f'{point.engine}.log')}"
    assert not said, said
    return read_record(place / "record.json"), place


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("model/*.safetensors")
    return load_file(path)


def _distance(folder: Path, reference: Path) -> float:
    """Between what two runs saved, which has the same names, shapes and types."""
    mine, theirs = _weights(folder), _weights(reference)
    assert {name: (t.shape, t.dtype) for name, t in mine.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    return math.sqrt(sum(float((mine[name].double() - theirs[name].double()).square().sum()) for name in theirs))


def _size(folder: Path) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in _weights(folder).values()))


@pytest.mark.multiprocess
@pytest.mark.parametrize("point", SLICE, ids=lambda point: f"{point.engine}-{point.name}")
def test_two_processes_train_as_one(point: Combination, ran: Ran) -> None:
    """AdamW in float32, on one engine of each kind."""
    held_against_one_process(point, ran)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first of an engine runs all of it
@pytest.mark.multiprocess
@pytest.mark.parametrize("point", REST, ids=lambda point: f"{point.engine}-{point.name}")
def test_every_combination_that_is_said_to_run(point: Combination, ran: Ran) -> None:
    """All others that run on CPU."""
    held_against_one_process(point, ran)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.multiprocess
@pytest.mark.parametrize("point", ALONE, ids=lambda point: f"{point.engine}-{point.name}")
def test_what_runs_in_one_process_alone(point: Combination, ran: Ran) -> None:
    """It learns, keeps the states that it should, and goes on identically."""
    record, folder = _record(ran("single"), point)
    assert record.outcome.kind == "ok"
    assert record.losses[-1] < record.losses[0]
    assert record.state_bytes is not None
    assert record.state_bytes.expected_optimizer == record.state_bytes.optimizer
    _goes_on(record, folder, 0.0)
