"""What a rehearsal books is what a real step on the CPU holds, to the byte."""

from __future__ import annotations

from typing import Any

import pytest

from peftbench.data.sources import Files
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.optim import OPTIMIZERS
from peftbench.profiler.memory_breakdown import MemoryPeak
from peftbench.recipe.schema import Profile, Recipe
from peftbench.record import MemoryBreakdown
from tests.helpers.methods import every_method
from tests.helpers.models import FAMILIES
from tests.helpers.workshop import Workshop
from tests.unit.memory.conftest import labels_a_row

KINDS: dict[str, Any] = dict(OPTIMIZERS)
WIDTH = 48
SHORT = 30
"""Shorter than any example, so that no row is padded."""


def made_and_rehearsed(recipe: Recipe, workshop: Workshop) -> tuple[MemoryBreakdown, MemoryPeak]:
    """Of six rows at once: the peak of a step that was made, and of the rehearsed one."""
    record = workshop.run(recipe)
    found = record.memory_breakdown
    assert found is not None
    assert record.tokens is not None
    assert record.tokens.padded == 6 * WIDTH * record.steps
    assert (record.tokens.real == record.tokens.padded) == (recipe.data.padding == "free")
    with MemorySimulation(recipe, "cpu", 1) as rehearsal:
        rehearsal.simulate_training(6, WIDTH, labels_a_row(record, 6))
    return found, rehearsal.memory_tracker.find_peak()


@every_method
@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("padding", ["max_length", "free"])
def test_the_peak_of_a_real_step(  # noqa: PLR0917
    method: Method,
    architecture: str,
    precision: str,
    checkpointing: bool,
    padding: str,
    workshop: Workshop,
    sources: dict[str, Files],
) -> None:
    """Weights, gradients, states, activations, logits and temporaries: each as in the step that was really made."""
    recipe = workshop.recipe(
        method,
        architecture=architecture,
        data={"padding": padding, "max_length": WIDTH, "source": sources[padding]},
        train={"precision": precision, "gradient_checkpointing": checkpointing, "steps": 3, "global_batch_size": 6},
        profile=Profile(untimed_steps=2, memory_breakdown=True),
    )
    found, expected = made_and_rehearsed(recipe, workshop)
    assert expected.nbytes == pytest.approx(found.peak_bytes, rel=1e-6)
    assert expected.bytes_by_category == found.bytes_by_category


@pytest.mark.parametrize("quantization", ["nf4", "nf4_double"])
@pytest.mark.parametrize("method", [Lora(r=4), PromptTuning(num_virtual_tokens=5)], ids=["lora", "prompt_tuning"])
def test_over_a_packed_base(method: Method, quantization: str, workshop: Workshop, sources: dict[str, Files]) -> None:
    """Four bits a weight, their scales, and what is unpacked in the backward pass."""
    recipe = workshop.recipe(
        method,
        model={"quantization": quantization},
        data={"padding": "max_length", "max_length": WIDTH, "source": sources["max_length"]},
        train={"steps": 3, "global_batch_size": 6},
        profile=Profile(untimed_steps=2, memory_breakdown=True),
    )
    found, expected = made_and_rehearsed(recipe, workshop)
    assert (expected.nbytes, expected.bytes_by_category) == (found.peak_bytes, found.bytes_by_category)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"paged_adamw8bit", "deepspeed_cpu_adam"}))
def test_every_optimizer(name: str, workshop: Workshop, sources: dict[str, Files]) -> None:
    """States and what a step makes beside them, with accumulation, so that gradients are there at the peak."""
    kind = KINDS[name](**({"rank": 8} if name in {"galore", "apollo"} else {}))
    recipe = workshop.recipe(
        Full(),
        optimizer=kind,
        data={"padding": "max_length", "max_length": SHORT, "overlong": "drop", "source": sources["free"]},
        train={"steps": 3, "global_batch_size": 6, "micro_batch_size": 2, "precision": "bf16"},
        profile=Profile(untimed_steps=2, memory_breakdown=True),
    )
    record = workshop.run(recipe)
    found = record.memory_breakdown
    assert found is not None
    assert record.tokens is not None
    assert record.tokens.real == record.tokens.padded
    with MemorySimulation(recipe, "cpu", 3, has_padding=False) as rehearsal:
        rehearsal.simulate_training(2, SHORT, labels_a_row(record, 6))
    expected = rehearsal.memory_tracker.find_peak()
    # torchao's scalars on the CPU live a little longer than there: 16 bytes of them.
    assert expected.bytes_by_category == pytest.approx(found.bytes_by_category, rel=1e-6, abs=16)
    assert (expected.operation, expected.step_part) == (found.operation, found.step_part)
