"""Plans of rank 0 of several processes: every engine, sharding, refusals, and restored global state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState

from peftbench.distributed.engines import ENGINES
from peftbench.errors import CombinationError, EngineError, EstimateUnavailableError, MissingFileError, OutOfRangeError
from peftbench.memory.devices import UNKNOWN_DEVICE
from peftbench.memory.estimate import estimate
from peftbench.memory.launch_config import load_launch_config
from peftbench.memory.plan import Plan
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.optim import OPTIMIZERS
from peftbench.recipe.schema import Recipe
from peftbench.report.tables.memory_plan import format_plan
from tests.helpers.methods import ONE_OF_EACH
from tests.helpers.paths import REPOSITORY
from tests.helpers.workshop import Workshop

OPTIMIZER_CLASSES: dict[str, Any] = dict(OPTIMIZERS)
PLANNED = [name for name in ENGINES if name not in {"single", "zero3_nvme"}]
FAST = {("ddp", "full"), ("zero2", "prompt_tuning"), ("zero3", "last_layer"), ("fsdp2", "lora")}
"""One engine of each kind, each with another method; the rest is slow, e.g. offload, which compiles an optimizer."""
POINTS = [
    pytest.param(engine, method, marks=() if (engine, method) in FAST else pytest.mark.slow)
    for engine in PLANNED
    for method in ONE_OF_EACH
]


@pytest.fixture
def make_plan(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that plans rank 0 of a training with an engine."""
    monkeypatch.chdir(REPOSITORY)

    def plan_engine(engine: str, method: Method, processes: int = 2, **parts: Any) -> Plan:
        train = {"global_batch_size": 24, "micro_batch_size": 2} | parts.pop("train", {})
        recipe: Recipe = workshop.recipe(method, train=train, **parts)
        launch_config = load_launch_config(Path("accel_configs") / f"{engine}.yaml", processes, recipe)
        assert launch_config.engine.name == engine
        return estimate(recipe, UNKNOWN_DEVICE, "a GPU", launch_config=launch_config)

    return plan_engine


@pytest.mark.parametrize(("engine", "method"), POINTS)
def test_plan_of_every_engine_has_every_phase(engine: str, method: str, make_plan: Any) -> None:
    """Training, evaluation and generation are planned; DeepSpeed steps within its backward call."""
    plan = make_plan(
        engine, ONE_OF_EACH[method], 3, train={"precision": "bf16"}, evaluate={"metrics": None, "batch_size": 2}
    )
    steps = {"backward_and_optimizer"} if ENGINES[engine].is_deepspeed else {"backward", "optimizer"}
    assert {"forward", "evaluate", "generate", *steps} <= set(plan.phase_peaks)
    assert (plan.engine, plan.num_processes, plan.micro_batch_size, plan.gradient_accumulation_steps) == (
        engine,
        3,
        2,
        4,
    )
    for part in plan.phase_peaks.values():
        assert 0 < part.live_bytes == sum(part.live_bytes_by_category.values())
    assert f"{engine}, per process (3 processes)" in format_plan(plan)


@pytest.mark.slow
def test_sharded_and_offloaded_tensors(make_plan: Any) -> None:
    """ZeRO-1 to 3 and FSDP2 shard states, ZeRO-3 and FSDP2 weights; offloaded tensors are not on the device."""
    live_bytes = {
        (engine, processes): make_plan(engine, Full(), processes).phase_peaks["forward"].live_bytes_by_category
        for engine in PLANNED
        for processes in ((2, 4) if engine in {"ddp", "zero1", "zero2", "zero3", "fsdp2"} else (2,))
    }
    values = live_bytes["ddp", 2]["weights"] / 4
    for engine, copies in (("zero1", 3), ("zero2", 3), ("zero3", 3), ("fsdp2", 2)):  # two moments, and a float32 copy
        assert live_bytes[engine, 2]["optimizer_state"] == pytest.approx(copies * 4 * values / 2, rel=0.01)
    for engine in ("zero1", "zero2", "zero3", "fsdp2"):
        ratio = live_bytes[engine, 4]["optimizer_state"] / live_bytes[engine, 2]["optimizer_state"]
        assert 0.49 < ratio < 0.52
    for engine in ("zero3", "fsdp2"):
        assert live_bytes[engine, 4]["weights"] < 0.55 * live_bytes[engine, 2]["weights"]
        assert live_bytes[engine, 2]["gathered_weights"] > 0
    assert live_bytes["ddp", 4] == live_bytes["ddp", 2]
    assert live_bytes["ddp", 2]["buckets"] == live_bytes["ddp", 2]["gradients"]
    for engine in ("zero2_offload", "zero3_offload"):
        assert "optimizer_state" not in live_bytes[engine, 2]
    assert live_bytes["zero3_offload", 2].get("weights", 0) < 0.1 * live_bytes["zero3", 2]["weights"]


@pytest.mark.parametrize("engines", [("zero2",), pytest.param(tuple(PLANNED), id="all", marks=pytest.mark.slow)])
def test_plan_restores_global_state(engines: tuple[str, ...], make_plan: Any, workshop: Workshop) -> None:
    """Patched functions and process state are restored, and the next plans are equal."""
    from deepspeed.accelerator import get_accelerator

    single = workshop.recipe(Full())
    before = estimate(single, UNKNOWN_DEVICE, "a GPU")

    def read_state() -> tuple[object, ...]:
        return (
            dict(os.environ),
            dict(PartialState._shared_state),
            torch.get_num_threads(),
            torch.nn.functional.linear,
            get_accelerator(),
            torch.Tensor.data_ptr,
            torch.autocast,
            torch.UntypedStorage.resize_,
        )

    state = read_state()
    first = [make_plan(engine, Lora(r=4)) for engine in engines]
    assert read_state() == state
    assert not torch.distributed.is_initialized()
    assert not hasattr(torch, "meta")
    assert [make_plan(engine, Lora(r=4)) for engine in engines] == first
    assert estimate(single, UNKNOWN_DEVICE, "a GPU") == before


def test_cpu_adam_is_planned_as_adamw(make_plan: Any) -> None:
    """Its states are in CPU memory, and its compiled kernel is not needed for the plan."""
    kinds = ("adamw", "deepspeed_cpu_adam")
    plans = [make_plan("zero2_offload", Full(), optimizer=OPTIMIZER_CLASSES[kind]()) for kind in kinds]
    assert plans[0] == plans[1]
    assert all("optimizer_state" not in phase.live_bytes_by_category for phase in plans[1].phase_peaks.values())


def test_unsupported_launches_are_refused(make_plan: Any, workshop: Workshop, tmp_path: Path) -> None:
    """Each message names the reason."""
    with pytest.raises(EstimateUnavailableError, match="zero3_nvme offloads to NVMe is not modeled"):
        make_plan("zero3_nvme", Full(), optimizer=OPTIMIZER_CLASSES["deepspeed_cpu_adam"]())
    with pytest.raises(CombinationError, match="needs matrices"):
        make_plan("zero2", Full(), optimizer=OPTIMIZER_CLASSES["galore"](rank=8))
    with pytest.raises(OutOfRangeError, match="is not divisible by 5 processes"):
        make_plan("ddp", Full(), 5)
    recipe = workshop.recipe(Full())
    with pytest.raises(MissingFileError, match=r"accelerate config .* does not exist"):
        load_launch_config(tmp_path / "none.yaml", None, recipe)
    invalid = tmp_path / "invalid.yaml"
    for text in ("distributed_type: NONSENSE\ncompute_environment: LOCAL_MACHINE\n", "a: [", "- a list\n"):
        invalid.write_text(text, encoding="utf-8")
        with pytest.raises(EngineError, match="accelerate rejects"):
            load_launch_config(invalid, None, recipe)


def test_config_of_one_process_is_single(workshop: Workshop) -> None:
    """The number of processes is that of the file."""
    launch_config = load_launch_config(REPOSITORY / "accel_configs" / "single_gpu.yaml", None, workshop.recipe(Full()))
    assert (launch_config.is_single_process, launch_config.num_processes) == (True, 1)


@pytest.mark.slow
def test_command_prints_only_json(workshop: Workshop, tmp_path: Path) -> None:
    """Messages of DeepSpeed and torch are suppressed."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(workshop.recipe(Full()).model_dump_json(), encoding="utf-8")  # JSON is valid YAML
    command = [
        sys.executable,
        "-c",
        "from peftbench.cli.app import main; main()",
        "estimate",
        "--json",
        "--config",
        str(recipe),
        "--accelerate",
        "accel_configs/zero2.yaml",
        "--processes",
        "3",
    ]
    process = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    plan = Plan(**json.loads(process.stdout))
    assert (plan.engine, plan.num_processes) == ("zero2", 3)
    assert process.stderr == ""
