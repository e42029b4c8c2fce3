"""build_accelerator refuses a launch that contradicts the recipe, the launcher or the machine."""

from __future__ import annotations

import pytest

from peftbench.distributed.accelerator import build_accelerator, collect_environment_warnings, verify_equal_recipes
from peftbench.errors import EngineError
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from tests.helpers.workshop import Workshop


def test_missing_tracker_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate would only warn, and the run would not be tracked."""
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(EngineError, match="trackers not installed: tensorboard"):
        build_accelerator(workshop.recipe(Full(), trackers=("tensorboard",)), workshop.output)


def test_gradient_accumulation_of_the_environment_is_refused(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate would divide every gradient again."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(EngineError, match="sets 4 gradient accumulation steps, which the recipe determines"):
        build_accelerator(workshop.recipe(Full()), workshop.output)


def test_feature_cache_on_several_machines_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is a memory-mapped file of one machine; the check comes before processes form a group."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    train = {"feature_cache": "fp32", "global_batch_size": 8}
    with pytest.raises(EngineError, match="needs all 4 processes on one machine, and 2 of them are on this one"):
        build_accelerator(workshop.recipe(LastLayer(), train=train), workshop.output)


def test_processes_for_gpus_without_a_gpu_are_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise processes that each expect a GPU would silently share the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EngineError, match="started 2 processes for GPUs, and this machine has no GPU"):
        build_accelerator(workshop.recipe(Full()), workshop.output)


@pytest.mark.parametrize(("use_cpu", "num_warnings"), [("False", 1), ("True", 0)])
def test_missing_gpu_is_noted(
    use_cpu: str, num_warnings: int, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU one process runs on the CPU; the record notes it unless the CPU was requested."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    accelerator = build_accelerator(workshop.recipe(Full()), workshop.output).accelerator
    assert len(collect_environment_warnings(accelerator)) == num_warnings


def test_exported_master_addr_is_not_a_failed_launch(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster may export MASTER_ADDR for every job; only a launcher's own value means that workers are missing."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(
        "peftbench.distributed.launcher_env.is_set_in_parent_process", lambda variable: variable == "MASTER_ADDR"
    )
    assert build_accelerator(workshop.recipe(Full()), workshop.output).accelerator.num_processes == 1


def test_missing_workers_are_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that set an address but no rank started one of several processes."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("peftbench.distributed.launcher_env.is_set_in_parent_process", lambda _: False)
    with pytest.raises(EngineError, match="requests several processes and the launcher started one"):
        build_accelerator(workshop.recipe(Full()), workshop.output)


def test_processes_that_resolved_auto_differently_are_refused(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two machines has bf16: the processes would train in different precisions."""
    recipe = workshop.recipe(Full())
    context = build_accelerator(recipe, workshop.output)
    verify_equal_recipes(context.accelerator, recipe)
    monkeypatch.setattr(
        "peftbench.distributed.collectives.all_gather_objects", lambda _, own: [own, ("bf16", *own[1:])]
    )
    with pytest.raises(EngineError, match=r"resolved train\.precision.*'fp32'.*'bf16'.*instead of auto"):
        verify_equal_recipes(context.accelerator, recipe)
