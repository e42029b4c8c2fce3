"""The compatibility table: allowed combinations train like one process, and the others are refused."""

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
    FROZEN_DTYPES,
    GRADIENT_READER,
    LIGER,
    METHOD_FEATURES,
    MICRO_BATCH_TOKENS,
    NO_LORA,
    OPTIONAL_FEATURES,
    QUANTIZATION,
    RULES,
    TRIED_METHOD,
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
from peftbench.methods import METHOD_FAMILIES
from peftbench.methods.base import Method
from peftbench.optim import OPTIMIZERS
from peftbench.record import RunRecord, read_record
from peftbench.run.runner import Run
from tests.distributed.battery import RESUMED, STEPS, UNTRAINED, build_recipe, run_fresh_process
from tests.distributed.tolerances import resume_tolerance, resume_tolerance_single, tolerance, weight_tolerance
from tests.helpers.engines import DISTRIBUTED_ENGINES, RunEngine, list_runnable
from tests.helpers.methods import ONE_OF_EACH
from tests.helpers.paths import REPOSITORY
from tests.helpers.peft_types import build_method
from tests.helpers.workshop import Workshop

PAGE = REPOSITORY / "docs" / "reference" / "compatibility.md"
ADAMW_FP32 = [
    point
    for engine in ("ddp", "zero2", "fsdp2")
    for point in list_runnable(engine)
    if (point.optimizer, point.precision) == ("adamw", "fp32")
]
DISTRIBUTED = [point for engine in DISTRIBUTED_ENGINES for point in list_runnable(engine)]
REST = [point for point in DISTRIBUTED if point not in ADAMW_FP32]
SINGLE_ONLY = [
    point
    for point in list_runnable("single")
    if not any(
        find_blocking_rule(dataclasses.replace(point, engine=engine), "cpu") is None for engine in DISTRIBUTED_ENGINES
    )
]
"""Combinations that run in one process only."""
ALL_COMBINATIONS = [
    point
    for extras in ((), *((extra,) for extra in OPTIONAL_FEATURES))
    for point in iter_combinations(optional_features=extras)
]
REFUSED = [
    point
    for point in ALL_COMBINATIONS
    if any(find_blocking_rule(point, device) is not None for device in ("cpu", "cuda"))
]
CPU_RULES = [
    rule
    for rule in RULES
    if any(p.precision != "fp16" and find_blocking_rule(p, "cpu") is rule for p in ALL_COMBINATIONS)
]
"""Rules that refuse a combination without fp16 on CPU."""
REFUSED_BY_ENGINE_AND_OPTIMIZER: dict[tuple[str, str], list[Combination]] = {}
for refused_point in REFUSED:
    REFUSED_BY_ENGINE_AND_OPTIMIZER.setdefault((refused_point.engine, refused_point.optimizer), []).append(
        refused_point
    )
PARTS = tuple(field.name for field in dataclasses.fields(Combination))


def test_table_covers_every_combination() -> None:
    """Each combination runs or is refused, each engine runs each method, and each rule refuses a combination."""
    assert len(list(iter_combinations())) == len(METHOD_FAMILIES) * len(ENGINES) * len(OPTIMIZERS) * 3
    assert {point.optimizer for point in SINGLE_ONLY} == {"adamw_bf16", "adamw8bit_bf16", "lisa"}
    assert {(p.engine, p.method) for p in DISTRIBUTED} == {
        (engine, method) for engine in DISTRIBUTED_ENGINES for method in METHOD_FAMILIES
    }
    assert set(ADAMW_FP32) < set(DISTRIBUTED)
    used_rules = {find_blocking_rule(point, device) for point in ALL_COMBINATIONS for device in ("cpu", "cuda")}
    assert used_rules == {None, *RULES}
    gpu_rules = {rule for rule in RULES if rule not in CPU_RULES}
    assert all(
        rule.precisions == frozenset({"fp16"}) or "paged_adamw8bit" in (rule.optimizers or ()) for rule in gpu_rules
    )


@pytest.mark.parametrize("step", [pytest.param(1, id="all", marks=pytest.mark.slow), pytest.param(7, id="some")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_refusal_has_the_reason_and_the_nearest_alternative(engine: str, optimizer: str, step: int) -> None:
    """All nearest alternatives run, and they differ from the refused combination in equally many parts."""
    points = REFUSED_BY_ENGINE_AND_OPTIMIZER.get((engine, optimizer), [])
    for point, device in itertools.product(points[::step], ("cpu", "cuda")):
        rule = find_blocking_rule(point, device)
        if rule is None:
            continue
        alternatives = find_nearest_supported(point, device)
        assert alternatives
        assert all(find_blocking_rule(other, device) is None for other in alternatives)
        assert len({_count_changes(point, other) for other in alternatives}) == 1
        with pytest.raises(CombinationError) as raised:
            check(point, device)
        change = describe_changes(point, alternatives[0], device)
        is_config = change.startswith("accel_configs/")
        assert f"{rule.reason}; use {'the accelerate config ' * is_config}{change}" in str(raised.value)


def _count_changes(point: Combination, other: Combination) -> int:
    return sum(getattr(point, part) != getattr(other, part) for part in PARTS)


def test_nearest_alternative_has_the_fewest_changes() -> None:
    """No supported combination with the same method differs in fewer parts."""
    for device in ("cpu", "cuda"):
        supported = [point for point in ALL_COMBINATIONS if find_blocking_rule(point, device) is None]
        for point in REFUSED[::23]:
            if find_blocking_rule(point, device) is not None:
                candidates = (
                    other
                    for other in supported
                    if other.optional_features <= point.optional_features and other.method == point.method
                )
                assert _count_changes(point, find_nearest_supported(point, device)[0]) <= min(
                    _count_changes(point, other) for other in candidates
                )


@pytest.mark.parametrize("rule", CPU_RULES, ids=lambda rule: rule.reason[:40])
def test_each_rule_refuses_a_launch(rule: Rule, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe and a launcher's environment are refused before the process group starts."""
    point = next(
        p for p in ALL_COMBINATIONS if p.precision != "fp16" and find_blocking_rule(p, "cpu") is rule and _has_recipe(p)
    )
    _set_launcher_environment(point.engine, monkeypatch)
    monkeypatch.setattr("peftbench.distributed.deepspeed.check_nvme_support", lambda: None)
    recipe = workshop.recipe(
        _choose_method(point),
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
        model={
            "quantization": "nf4" if QUANTIZATION in point.optional_features else None,
            "dtype": next((dtype for dtype, name in FROZEN_DTYPES.items() if name in point.optional_features), "auto"),
        },
        checkpoint={"interval": 2 if CHECKPOINTING in point.optional_features else None},
    )
    with pytest.raises(CombinationError) as raised:
        build_accelerator(recipe, workshop.output)
    assert rule.reason in str(raised.value)


def _choose_method(point: Combination) -> Method:
    """Return a method with the features of the combination."""
    if GRADIENT_READER in point.optional_features:
        return build_method("ADALORA")
    is_tried = point.optional_features & {TRIED_METHOD, NO_LORA}
    return build_method("IA3") if is_tried else _first_method(point)


def _first_method(point: Combination) -> Method:
    """Return the method that represents the family."""
    return ONE_OF_EACH[METHOD_FAMILIES[point.method][0]]


def _has_recipe(point: Combination) -> bool:
    """True if a valid recipe exists: one with a feature cache needs a method with a frozen backbone."""
    if point.optional_features & METHOD_FEATURES.keys() and point.method != "lora":
        return False
    return FEATURE_CACHE not in point.optional_features or _first_method(point).has_frozen_backbone


def _set_launcher_environment(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ENGINES[engine]
    monkeypatch.setenv("WORLD_SIZE", "1" if kind is SINGLE else "2")
    if kind.is_deepspeed:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(REPOSITORY / "ds_configs" / f"{engine}.json"))
    if kind.is_fsdp:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")


def assert_matches_one_process(point: Combination, run_engine: RunEngine) -> None:
    """Check that the run ended as ok, its loss decreased, and losses, states and weights match those of one process."""
    if ENGINES[point.engine].offloads_to_nvme:
        _skip_without_libaio()
    record, folder = _read_record(run_engine(point.engine), point)
    assert record.outcome.kind == "ok"
    assert record.engine is not None
    assert record.engine.name == point.engine
    assert record.device.num_processes == 2
    single, single_folder = _read_record(
        run_engine("single"),
        Combination(point.method, "single", point.optimizer.replace("deepspeed_cpu_adam", "adamw"), point.precision),
    )
    allowed = tolerance(point)
    assert record.step_losses[-1] < record.step_losses[0]
    assert record.quality is not None
    assert single.quality is not None
    if ENGINES[point.engine].offloads_to_nvme and point.precision == "bf16" and _first_method(point).freezes_weights:
        assert record.quality.loss == pytest.approx(single.quality.loss, rel=0.02)  # another type of frozen weights
        _assert_dtypes(point, folder)
        return
    assert record.quality.loss == pytest.approx(single.quality.loss, rel=allowed)
    per_example, expected = record.quality.per_example, single.quality.per_example
    assert per_example is not None
    assert expected is not None
    assert per_example.loss == pytest.approx(expected.loss, rel=20 * allowed)
    assert (per_example.examples_fingerprint, per_example.labeled_tokens) == (
        expected.examples_fingerprint,
        expected.labeled_tokens,
    )
    assert (record.flops.model_flops, record.tokens) == (single.flops.model_flops, single.tokens)
    assert len(record.state_bytes_by_rank) == (0 if ENGINES[point.engine].offloads_to_nvme else 2)
    for states in record.state_bytes_by_rank:
        assert states.expected_optimizer == states.optimizer + states.cpu_offloaded
    untrained = run_engine("single") / f"{point.method}-{UNTRAINED}-{point.precision}"
    weight_difference = _distance(folder, single_folder) / _distance(single_folder, untrained)
    loss_difference = max(abs(a / b - 1) for a, b in zip(record.step_losses, single.step_losses, strict=True))
    allowed_weights = weight_tolerance(point)
    print(  # noqa: T201
        f"{point.engine}-{point.name}: losses {loss_difference:.2e}/{allowed:.0e}, "
        f"weights {weight_difference:.4f}/{allowed_weights}"
    )
    assert weight_difference < allowed_weights
    assert loss_difference < allowed
    assert _list_dtypes(folder) == _list_dtypes(single_folder)
    _assert_resumed_run_matches(single, single_folder, resume_tolerance_single(point))
    if not ENGINES[point.engine].offloads_to_nvme:
        _assert_resumed_run_matches(record, folder, resume_tolerance(point))
    if not ENGINES[point.engine].shards_weights:
        first, second = ((folder.parent / f"weights-{rank}").read_text(encoding="utf-8") for rank in (0, 1))
        assert first == second  # digests of rank 0 and rank 1 after each run of the engine
        assert first
    _assert_dtypes(point, folder)
    if ENGINES[point.engine].zero_stage == 3 and point.method == "full":
        loaded = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in _load_weights(folder).items())


def _assert_dtypes(point: Combination, folder: Path) -> None:
    """Check that the engine held frozen weights in the type of the precision, and trained ones in float32.

    zero3_nvme holds all in float32.
    """
    precision = "fp32" if ENGINES[point.engine].offloads_to_nvme else point.precision
    dtype = {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[precision]
    expected = f"frozen={dtype if _first_method(point).freezes_weights else ''} trained=torch.float32"
    for rank in (0, 1):
        lines = (folder.parent / f"dtypes-{rank}").read_text(encoding="utf-8").splitlines()
        recorded = {line.removeprefix(f"{point.name} ") for line in lines if line.startswith(f"{point.name} ")}
        assert recorded == {expected}


def _skip_without_libaio() -> None:
    try:
        check_nvme_support()
    except EngineError as error:
        pytest.skip(str(error))


def _assert_resumed_run_matches(record: RunRecord, folder: Path, allowed: float) -> None:
    """Check that the stopped and resumed run has the same loss in each step and the same weights."""
    resumed = read_record(folder.with_name(f"{folder.name}{RESUMED}") / "record.json")
    assert resumed.outcome.kind == "ok"
    assert resumed.resumed_after == (STEPS // 2,)
    assert resumed.quality is not None
    assert record.quality is not None
    assert resumed.step_losses == pytest.approx(record.step_losses, rel=allowed, abs=0)
    assert resumed.quality.loss == pytest.approx(record.quality.loss, rel=allowed, abs=0)
    assert (resumed.tokens, resumed.flops) == (record.tokens, record.flops)
    assert _list_dtypes(folder.with_name(f"{folder.name}{RESUMED}")) == _list_dtypes(folder)
    assert _distance(folder.with_name(f"{folder.name}{RESUMED}"), folder) <= allowed * _norm(folder)


def _read_record(folder: Path, point: Combination) -> tuple[RunRecord, Path]:
    run_dir = folder / point.name
    traceback = "".join(path.read_text(encoding="utf-8") for path in sorted(run_dir.glob("*-refused.txt")))
    assert (run_dir / "record.json").exists(), traceback or f"no record: {(folder.parent / f'{point.engine}.log')}"
    assert not traceback, traceback
    return read_record(run_dir / "record.json"), run_dir


def _load_weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("model/*.safetensors")
    return load_file(path)


def _distance(folder: Path, reference: Path) -> float:
    """Return the L2 distance between the saved weights of two runs; names and shapes must be equal."""
    a, b = _load_weights(folder), _load_weights(reference)
    assert {name: tensor.shape for name, tensor in a.items()} == {name: tensor.shape for name, tensor in b.items()}
    return math.sqrt(sum(float((a[name].double() - b[name].double()).square().sum()) for name in b))


def _list_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Return the type of each saved tensor; one that the optimizer freezes is saved in the type of frozen weights."""
    return {name: tensor.dtype for name, tensor in _load_weights(folder).items()}


def _norm(folder: Path) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in _load_weights(folder).values()))


@pytest.mark.timeout(1800)  # the first test of an engine runs all its combinations
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "point",
    [
        pytest.param(
            point,
            id=f"{point.engine}-{point.name}",
            marks=() if (point.engine, point.method) == ("ddp", "lora") else pytest.mark.slow,
        )
        for point in ADAMW_FP32
    ],
)
def test_two_processes_match_one_with_adamw(point: Combination, run_engine: RunEngine) -> None:
    """AdamW in float32 runs on one engine of each kind."""
    assert_matches_one_process(point, run_engine)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.multiprocess
@pytest.mark.parametrize("point", REST, ids=lambda point: f"{point.engine}-{point.name}")
def test_two_processes_match_one_with_every_other_combination(point: Combination, run_engine: RunEngine) -> None:
    """All other combinations that the table allows on CPU run."""
    assert_matches_one_process(point, run_engine)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.multiprocess
@pytest.mark.parametrize("point", SINGLE_ONLY, ids=lambda point: f"{point.engine}-{point.name}")
def test_single_process_combination_trains_and_resumes(point: Combination, run_engine: RunEngine) -> None:
    """Its loss decreases, its optimizer states have the expected size, and a resumed run is bit-identical."""
    record, folder = _read_record(run_engine("single"), point)
    assert record.outcome.kind == "ok"
    assert record.step_losses[-1] < record.step_losses[0]
    assert record.state_bytes is not None
    assert record.state_bytes.expected_optimizer == record.state_bytes.optimizer
    _assert_resumed_run_matches(record, folder, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", [p for p in list_runnable("single") if p not in SINGLE_ONLY], ids=lambda point: point.name
)
def test_tolerances_catch_a_lost_process(
    point: Combination, folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without half of the gradients, as if one process were lost, losses or weights exceed the tolerances."""
    _, base, data = folders
    recipe = build_recipe(point, str(base), str(data), tmp_path)
    complete, _ = Run(recipe).execute()
    run_fresh_process()
    calls = itertools.count()
    backward = Accelerator.backward
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: backward(self, loss * (next(calls) % 2)))
    lost, _ = Run(recipe.model_copy(update={"name": "lost"})).execute()
    run_fresh_process()
    untrained, _ = Run(
        build_recipe(dataclasses.replace(point, optimizer=UNTRAINED), str(base), str(data), tmp_path)
    ).execute()
    run_dirs = [tmp_path / "single" / name for name in (complete.name, "lost", untrained.name)]
    loss_difference = max(abs(a / b - 1) for a, b in zip(lost.step_losses, complete.step_losses, strict=True))
    weight_difference = _distance(run_dirs[1], run_dirs[0]) / _distance(run_dirs[0], run_dirs[2])
    allowed_weights = weight_tolerance(point)
    print(  # noqa: T201
        f"{point.name}: losses {loss_difference:.2e}/{tolerance(point):.0e}, "
        f"weights {weight_difference:.3f}/{allowed_weights}"
    )
    assert loss_difference > tolerance(point) or weight_difference > allowed_weights
