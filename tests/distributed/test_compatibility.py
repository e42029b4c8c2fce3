"""The compatibility table: what it says runs does, what it refuses is refused, and the page is made from it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peftbench.distributed.accelerator import build_accelerator
from peftbench.distributed.compatibility import (
    ACTIVATION_OFFLOAD,
    CHECKPOINTING,
    COMPILE,
    FEATURE_CACHE,
    LIGER,
    MICRO_BATCH_TOKENS,
    OPTIONAL_FEATURES,
    QUANTIZATION,
    RULES,
    Combination,
    Rule,
    check,
    describe_changes,
    find_blocking_rule,
    find_nearest_supported,
    iter_combinations,
)
from peftbench.distributed.deepspeed import check_nvme_support
from peftbench.distributed.engines import ENGINES, SINGLE
from peftbench.errors import CombinationError, EngineError
from peftbench.methods import METHODS
from peftbench.optim import OPTIMIZERS
from peftbench.record import RunRecord, read_record
from peftbench.run.runner import Run
from tests.distributed.battery import RESUMED, STEPS, UNTRAINED, fresh_process, recipe
from tests.distributed.conftest import SEVERAL, Ran, runnable
from tests.distributed.tolerances import moved_apart, resumed_alone, resumed_apart, tolerance
from tests.helpers.methods import ONE_OF_EACH
from tests.helpers.paths import REPOSITORY
from tests.helpers.workshop import Workshop

PAGE = REPOSITORY / "docs" / "reference" / "compatibility.md"
SLICE = [
    point
    for engine in ("ddp", "zero2", "fsdp2")
    for point in runnable(engine)
    if (point.optimizer, point.precision) == ("adamw", "fp32")
]
ALL = [point for engine in SEVERAL for point in runnable(engine)]
REST = [point for point in ALL if point not in SLICE]
ALONE = [
    point
    for point in runnable("single")
    if not any(find_blocking_rule(dataclasses.replace(point, engine=engine), "cpu") is None for engine in SEVERAL)
]
"""What runs in one process only."""
EVERY = [
    point
    for extras in ((), *((extra,) for extra in OPTIONAL_FEATURES))
    for point in iter_combinations(optional_features=extras)
]
REFUSED = [point for point in EVERY if any(find_blocking_rule(point, device) is not None for device in ("cpu", "cuda"))]
ON_CPU = [rule for rule in RULES if any(p.precision != "fp16" and find_blocking_rule(p, "cpu") is rule for p in EVERY)]
"""Rules that refuse something on CPU that fp16 is no part of."""
PARTS = tuple(field.name for field in dataclasses.fields(Combination))


def test_the_table_is_whole() -> None:
    """Every combination is either run or refused, every engine runs each method, and no rule is idle."""
    assert len(list(iter_combinations())) == len(METHODS) * len(ENGINES) * len(OPTIMIZERS) * 3
    assert {point.optimizer for point in ALONE} == {"adamw_bf16", "adamw8bit_bf16"}
    assert {(p.engine, p.method) for p in ALL} == {(engine, method) for engine in SEVERAL for method in METHODS}
    assert set(SLICE) < set(ALL)
    found = {find_blocking_rule(point, device) for point in EVERY for device in ("cpu", "cuda")}
    assert found == {None, *RULES}
    of_a_gpu = {rule for rule in RULES if rule not in ON_CPU}
    assert all(
        rule.precisions == frozenset({"fp16"}) or "paged_adamw8bit" in (rule.optimizers or ()) for rule in of_a_gpu
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_refused_is_told_why_and_what_to_do(engine: str, optimizer: str) -> None:
    """One sentence with the reason and something that does run, as near as can be."""
    for point, device in itertools.product(REFUSED, ("cpu", "cuda")):
        rule = find_blocking_rule(point, device) if (point.engine, point.optimizer) == (engine, optimizer) else None
        if rule is None:
            continue
        found = find_nearest_supported(point, device)
        assert found
        assert all(find_blocking_rule(other, device) is None for other in found)
        assert len({_changes(point, other) for other in found}) == 1
        with pytest.raises(CombinationError) as raised:
            check(point, device)
        assert f"{rule.reason}; use {describe_changes(point, found[0], device)}" in str(raised.value)


def _changes(point: Combination, other: Combination) -> int:
    return sum(getattr(point, part) != getattr(other, part) for part in PARTS)


def test_one_change_where_one_is_enough() -> None:
    """Over all that run: no refusal names two changes where one would do."""
    for device in ("cpu", "cuda"):
        runs = [point for point in EVERY if find_blocking_rule(point, device) is None]
        for point in REFUSED[::7]:
            if find_blocking_rule(point, device) is not None:
                same = (
                    other
                    for other in runs
                    if other.optional_features <= point.optional_features and other.method == point.method
                )
                assert _changes(point, find_nearest_supported(point, device)[0]) <= min(
                    _changes(point, other) for other in same
                )


@pytest.mark.parametrize("rule", ON_CPU, ids=lambda rule: rule.reason[:40])
def test_a_launch_is_refused_by_each_rule(rule: Rule, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a real recipe and a launcher's environment, before processes have met."""
    point = next(
        p for p in EVERY if p.precision != "fp16" and find_blocking_rule(p, "cpu") is rule and _can_be_meant(p)
    )
    _launched_as(point.engine, monkeypatch)
    monkeypatch.setattr("peftbench.distributed.deepspeed.check_nvme_support", lambda: None)
    recipe = workshop.recipe(
        ONE_OF_EACH[point.method],
        optimizer={"kind": point.optimizer},
        train={
            "precision": point.precision,
            "global_batch_size": 4,
            **(
                {"micro_batch_tokens": 100}
                if MICRO_BATCH_TOKENS in point.optional_features
                else {"micro_batch_size": 2}
            ),
            "compile": COMPILE in point.optional_features,
            "cross_entropy": "liger" if LIGER in point.optional_features else "torch",
            "activation_offloading": ACTIVATION_OFFLOAD in point.optional_features,
            "feature_cache": "fp32" if FEATURE_CACHE in point.optional_features else None,
        },
        model={"quantization": "nf4" if QUANTIZATION in point.optional_features else None},
        checkpoint={"interval": 2 if CHECKPOINTING in point.optional_features else None},
    )
    with pytest.raises(CombinationError) as raised:
        build_accelerator(recipe, workshop.output)
    assert rule.reason in str(raised.value)


def _can_be_meant(point: Combination) -> bool:
    """Whether there is a recipe for it at all: that of a trunk kept on disk is of a method that freezes it."""
    return FEATURE_CACHE not in point.optional_features or ONE_OF_EACH[point.method].has_frozen_backbone


def _launched_as(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ENGINES[engine]
    monkeypatch.setenv("WORLD_SIZE", "1" if kind is SINGLE else "2")
    if kind.is_deepspeed:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(REPOSITORY / "ds_configs" / f"{engine}.json"))
    if kind.is_fsdp:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")


def assert_held_against_one_process(point: Combination, ran: Ran) -> None:
    """The run ended well, its loss fell, and losses, states and weights are those of one process."""
    if ENGINES[point.engine].offloads_to_nvme:
        _skip_without_libaio()
    record, folder = _record(ran(point.engine), point)
    assert record.outcome.kind == "ok"
    assert record.engine is not None
    assert record.engine.name == point.engine
    assert record.device.num_processes == 2
    alone, reference = _record(
        ran("single"),
        Combination(point.method, "single", point.optimizer.replace("deepspeed_cpu_adam", "adamw"), point.precision),
    )
    allowed = tolerance(point)
    assert record.step_losses[-1] < record.step_losses[0]
    assert record.quality is not None
    assert alone.quality is not None
    assert record.quality.loss == pytest.approx(alone.quality.loss, rel=allowed)
    each, expected = record.quality.per_example, alone.quality.per_example
    assert each is not None
    assert expected is not None
    assert each.loss == pytest.approx(expected.loss, rel=20 * allowed)
    assert (each.examples_fingerprint, each.labelled_tokens) == (
        expected.examples_fingerprint,
        expected.labelled_tokens,
    )
    assert (record.flops.model_flops, record.tokens) == (alone.flops.model_flops, alone.tokens)
    assert len(record.state_bytes_by_rank) == (0 if ENGINES[point.engine].offloads_to_nvme else 2)
    for states in record.state_bytes_by_rank:
        assert states.expected_optimizer == states.optimizer + states.cpu_offloaded
    untrained = ran("single") / f"{point.method}-{UNTRAINED}-fp32"
    moved = _distance(folder, reference) / _distance(reference, untrained)
    losses = max(abs(mine / its - 1) for mine, its in zip(record.step_losses, alone.step_losses, strict=True))
    print(f"{point.engine}-{point.name}: losses {losses:.2e}/{allowed:.0e}, weights {moved:.4f}/{moved_apart(point)}")  # noqa: T201
    assert moved < moved_apart(point)
    assert losses < allowed
    _goes_on(alone, reference, resumed_alone(point))
    if not ENGINES[point.engine].offloads_to_nvme:
        _goes_on(record, folder, resumed_apart(point))
    if not ENGINES[point.engine].shards_weights:
        first, second = ((folder.parent / f"weights-{rank}").read_text(encoding="utf-8") for rank in (0, 1))
        assert first == second  # each process's own, of every run of the engine
        assert first
    if ENGINES[point.engine].zero_stage == 3 and point.method == "full":
        loaded = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in _weights(folder).items())


def _skip_without_libaio() -> None:
    try:
        check_nvme_support()
    except EngineError as error:
        pytest.skip(str(error))


def _goes_on(record: RunRecord, folder: Path, allowed: float) -> None:
    """Stopped after a checkpoint and launched again: the same losses, step by step, and the same weights."""
    resumed = read_record(folder.with_name(f"{folder.name}{RESUMED}") / "record.json")
    assert resumed.outcome.kind == "ok"
    assert resumed.resumed_after == (STEPS // 2,)
    assert resumed.quality is not None
    assert record.quality is not None
    assert resumed.step_losses == pytest.approx(record.step_losses, rel=allowed, abs=0)
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


@pytest.mark.timeout(1800)  # where it is run with all others, the first of an engine runs all of them
@pytest.mark.multiprocess
@pytest.mark.parametrize("point", SLICE, ids=lambda point: f"{point.engine}-{point.name}")
def test_two_processes_train_as_one(point: Combination, ran: Ran) -> None:
    """AdamW in float32, on one engine of each kind."""
    assert_held_against_one_process(point, ran)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.multiprocess
@pytest.mark.parametrize("point", REST, ids=lambda point: f"{point.engine}-{point.name}")
def test_every_combination_that_is_said_to_run(point: Combination, ran: Ran) -> None:
    """All others that run on CPU."""
    assert_held_against_one_process(point, ran)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.multiprocess
@pytest.mark.parametrize("point", ALONE, ids=lambda point: f"{point.engine}-{point.name}")
def test_what_runs_in_one_process_alone(point: Combination, ran: Ran) -> None:
    """It learns, keeps the states that it should, and goes on identically."""
    record, folder = _record(ran("single"), point)
    assert record.outcome.kind == "ok"
    assert record.step_losses[-1] < record.step_losses[0]
    assert record.state_bytes is not None
    assert record.state_bytes.expected_optimizer == record.state_bytes.optimizer
    _goes_on(record, folder, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("point", [p for p in runnable("single") if p not in ALONE], ids=lambda point: point.name)
def test_tolerances_catch_a_lost_process(
    point: Combination, places: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were half of the gradients to go missing, as those of a process that is not heard, the tests above would fail."""
    _, base, data = places
    made = recipe(point, str(base), str(data), tmp_path)
    whole, _ = Run(made).execute()
    fresh_process()
    calls = itertools.count()
    backward = Accelerator.backward
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: backward(self, loss * (next(calls) % 2)))
    lost, _ = Run(made.model_copy(update={"name": "lost"})).execute()
    fresh_process()
    untrained, _ = Run(
        recipe(dataclasses.replace(point, optimizer=UNTRAINED), str(base), str(data), tmp_path)
    ).execute()
    places_of = [tmp_path / "single" / name for name in (whole.name, "lost", untrained.name)]
    losses = max(abs(mine / its - 1) for mine, its in zip(lost.step_losses, whole.step_losses, strict=True))
    moved = _distance(places_of[1], places_of[0]) / _distance(places_of[0], places_of[2])
    print(f"{point.name}: losses {losses:.2e}/{tolerance(point):.0e}, weights {moved:.3f}/{moved_apart(point)}")  # noqa: T201
    assert losses > tolerance(point) or moved > moved_apart(point)
