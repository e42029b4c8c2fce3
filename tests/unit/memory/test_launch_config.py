"""Plans of one of several processes: of every engine, what they hold less of, what is refused, and what they leave."""

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
from tests.helpers.methods import every_method
from tests.helpers.paths import REPOSITORY
from tests.helpers.workshop import Workshop

KINDS: dict[str, Any] = dict(OPTIMIZERS)
PLANNED = [name for name in ENGINES if name not in {"single", "zero3_nvme"}]


@pytest.fixture
def planned(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Given an engine, a method and knobs, the plan of its first process."""
    monkeypatch.chdir(REPOSITORY)

    def made(engine: str, method: Method, processes: int = 2, **parts: Any) -> Plan:
        train = {"global_batch_size": 24, "micro_batch_size": 2} | parts.pop("train", {})
        recipe: Recipe = workshop.recipe(method, train=train, **parts)
        world = load_launch_config(Path("accel_configs") / f"{engine}.yaml", processes, recipe)
        assert world.engine.name == engine
        return estimate(recipe, UNKNOWN_DEVICE, "a GPU", launch_config=world)

    return made


@every_method
@pytest.mark.parametrize("engine", PLANNED)
def test_every_engine_has_a_plan(engine: str, method: Method, planned: Any) -> None:
    """With training, evaluation and generation in it; DeepSpeed steps within the backward pass."""
    plan = planned(engine, method, 3, train={"precision": "bf16"}, evaluate={"generate": True, "batch_size": 2})
    steps = {"backward_and_optimizer"} if ENGINES[engine].is_deepspeed else {"backward", "optimizer"}
    assert {"forward", "evaluate", "generate", *steps} <= set(plan.parts)
    assert (plan.engine, plan.processes, plan.rows, plan.micro_batches) == (engine, 3, 2, 4)
    for part in plan.parts.values():
        assert 0 < part.live_bytes == sum(part.live_by_kind.values())
    assert f"{engine}, per process, of 3" in format_plan(plan)


def test_what_is_shared_out(planned: Any) -> None:
    """States from ZeRO's first stage on, weights at its third and under fully_shard; what is offloaded is not there."""
    held = {
        (engine, processes): planned(engine, Full(), processes).parts["forward"].live_by_kind
        for engine in PLANNED
        for processes in (2, 4)
    }
    values = held["ddp", 2]["weights"] / 4
    for engine, copies in (("zero1", 3), ("zero2", 3), ("zero3", 3), ("fsdp2", 2)):  # two moments, and a float32 copy
        assert held[engine, 2]["optimizer_state"] == pytest.approx(copies * 4 * values / 2, rel=0.01)
    shared = {"zero1", "zero2", "zero3", "fsdp2"}
    for engine in shared:
        ratio = held[engine, 4]["optimizer_state"] / held[engine, 2]["optimizer_state"]
        assert 0.49 < ratio < 0.52
    for engine in ("zero3", "fsdp2"):
        assert held[engine, 4]["weights"] < 0.55 * held[engine, 2]["weights"]
        assert held[engine, 2]["gathered_weights"] > 0
    assert held["ddp", 4] == held["ddp", 2]
    assert held["ddp", 2]["buckets"] == held["ddp", 2]["gradients"]
    for engine in ("zero2_offload", "zero3_offload"):
        assert "optimizer_state" not in held[engine, 2]
    assert held["zero3_offload", 2].get("weights", 0) < 0.1 * held["zero3", 2]["weights"]


def test_a_plan_leaves_no_trace(planned: Any, workshop: Workshop) -> None:
    """What several processes change in this one is put back, and the next plan is as it would have been."""
    from deepspeed.accelerator import get_accelerator

    alone = workshop.recipe(Full())
    before = estimate(alone, UNKNOWN_DEVICE, "a GPU")
    kept = (
        dict(os.environ),
        dict(PartialState._shared_state),
        torch.get_num_threads(),
        torch.nn.functional.linear,
        get_accelerator(),
        torch.Tensor.data_ptr,
        torch.autocast,
        torch.UntypedStorage.resize_,
    )
    first = [planned(engine, Lora(r=4)) for engine in PLANNED]
    assert kept == (
        dict(os.environ),
        dict(PartialState._shared_state),
        torch.get_num_threads(),
        torch.nn.functional.linear,
        get_accelerator(),
        torch.Tensor.data_ptr,
        torch.autocast,
        torch.UntypedStorage.resize_,
    )
    assert not torch.distributed.is_initialized()
    assert not hasattr(torch, "meta")
    assert [planned(engine, Lora(r=4)) for engine in PLANNED] == first
    assert estimate(alone, UNKNOWN_DEVICE, "a GPU") == before


def test_refusals(planned: Any, workshop: Workshop, tmp_path: Path) -> None:
    """A sentence, and no figure."""
    with pytest.raises(EstimateUnavailableError, match="what zero3_nvme keeps on a disk"):
        planned("zero3_nvme", Full(), optimizer=KINDS["deepspeed_cpu_adam"]())
    with pytest.raises(CombinationError, match="needs the matrices"):
        planned("zero2", Full(), optimizer=KINDS["galore"](rank=8))
    with pytest.raises(OutOfRangeError, match="is not divisible by 5 processes"):
        planned("ddp", Full(), 5)
    recipe = workshop.recipe(Full())
    with pytest.raises(MissingFileError, match="there is no accelerate config"):
        load_launch_config(tmp_path / "none.yaml", None, recipe)
    strange = tmp_path / "strange.yaml"
    for text in ("distributed_type: NONSENSE\ncompute_environment: LOCAL_MACHINE\n", "a: [", "- a list\n"):
        strange.write_text(text, encoding="utf-8")
        with pytest.raises(EngineError, match="accelerate cannot launch from"):
            load_launch_config(strange, None, recipe)


def test_one_process_of_a_file_is_single(workshop: Workshop) -> None:
    """As a run from it would be, and by the file's own number."""
    world = load_launch_config(REPOSITORY / "accel_configs" / "single_gpu.yaml", None, workshop.recipe(Full()))
    assert (world.is_single_process, world.num_processes) == (True, 1)


def test_the_command_prints_its_answer_alone(workshop: Workshop, tmp_path: Path) -> None:
    """What DeepSpeed and torch have to say goes elsewhere."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(workshop.recipe(Full()).model_dump_json(), encoding="utf-8")  # which is YAML too
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
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    plan = Plan(**json.loads(done.stdout))
    assert (plan.engine, plan.num_processes) == ("zero2", 3)
    assert done.stderr == ""
