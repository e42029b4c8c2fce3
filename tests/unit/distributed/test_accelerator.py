"""What started is what was asked for, or nothing starts."""

from __future__ import annotations

import pytest

from peftbench.distributed.accelerator import build_accelerator, collect_environment_warnings
from peftbench.errors import EngineError
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from tests.helpers.workshop import Workshop


def test_a_tracker_that_is_not_installed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate would warn and go on without; a person who asked to watch would see nothing."""
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(EngineError, match="the trackers tensorboard are not installed"):
        build_accelerator(workshop.recipe(Full(), trackers=("tensorboard",)), workshop.output)


def test_accumulation_from_outside(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accumulation set in the environment would divide every gradient once more."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(EngineError, match="accumulate 4 times, and the recipe owns that"):
        build_accelerator(workshop.recipe(Full()), workshop.output)


def test_a_trunk_cache_of_several_machines(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapped file is one machine's; processes on two are told so before they have met."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    train = {"feature_cache": "fp32", "global_batch_size": 8}
    with pytest.raises(EngineError, match="that all 4 processes map, and 2 of them are on this machine"):
        build_accelerator(workshop.recipe(LastLayer(), train=train), workshop.output)


def test_processes_for_gpus_on_a_machine_without(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes that were to have a GPU each do not silently share a CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EngineError, match="2 processes were started for GPUs and there is no GPU"):
        build_accelerator(workshop.recipe(Full()), workshop.output)


@pytest.mark.parametrize(("asked", "said"), [("False", 1), ("True", 0)])
def test_a_gpu_that_was_not_found_is_said(
    asked: str, said: int, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process on a machine without a GPU runs on its CPU; where that was not asked for, the record says so."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", asked)
    assert (
        len(collect_environment_warnings(build_accelerator(workshop.recipe(Full()), workshop.output).accelerator))
        == said
    )


def test_an_address_from_outside_is_no_sign_of_a_failed_launch(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster the address may be exported for every job; only what the launcher itself set tells of several."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(
        "peftbench.distributed.accelerator._is_set_in_parent_process", lambda variable: variable == "MASTER_ADDR"
    )
    assert build_accelerator(workshop.recipe(Full()), workshop.output).accelerator.num_processes == 1
