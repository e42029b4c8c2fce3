"""The simulated peak equals the peak of live bytes in a real training step on CPU, to the byte."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from peftbench.data.sources import Files
from peftbench.memory.devices import get_device_facts
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.methods import METHOD_KINDS
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.methods.select_presets import Embeddings, LastBlocks
from peftbench.optim import OPTIMIZERS, Lisa
from peftbench.profiler.memory_breakdown import MemoryPeak
from peftbench.recipe.schema import Profile, Recipe
from peftbench.record import MemoryBreakdown
from tests.helpers.methods import ONE_OF_EACH, PRESETS, method_for
from tests.helpers.models import FAMILIES
from tests.helpers.records import count_labels_per_row
from tests.helpers.workshop import Workshop

OPTIMIZER_CLASSES: dict[str, Any] = dict(OPTIMIZERS)
SMALL_KEYS: dict[str, dict[str, int]] = {"galore": {"rank": 8}, "apollo": {"rank": 8}, "lisa": {"num_blocks": 1}}
"""Keys of optimizers whose defaults are too large for a small model."""
WIDTH = 48
SHORT = 30
"""Tokens per row, fewer than in any example, so that no row is padded."""
SWEEP = list(
    itertools.product(ONE_OF_EACH, FAMILIES, ("fp32", "bf16"), ("stored", "checkpointing"), ("max_length", "free"))
)
"""Every method x architecture x precision x checkpointing x padding."""
FAST = {
    ("full", "gpt2_tied", "fp32", "stored", "max_length"),
    ("lora", "llama_untied", "bf16", "stored", "free"),
    ("prompt_tuning", "llama_tied", "bf16", "checkpointing", "max_length"),
    ("last_layer", "gpt2_tied", "bf16", "stored", "max_length"),
    ("select", "llama_tied", "bf16", "checkpointing", "free"),
    *random.Random(29).sample(SWEEP, len(SWEEP) // 16 - 5),  # noqa: S311
}
"""A sixteenth of the sweep, which has each value of each axis, for the fast tests; the rest is slow."""
POINTS = [pytest.param(*point, id="-".join(point), marks=() if point in FAST else pytest.mark.slow) for point in SWEEP]
FAST_OPTIMIZERS = {"adamw", "adamw8bit_bf16", "adafactor", "galore", "lora_fa"}
"""One per way of keeping states: per parameter, 8-bit, factored, low-rank, inverses; the others are slow here, and
test_estimate.py checks the states of each."""


def measure_and_simulate(recipe: Recipe, workshop: Workshop) -> tuple[MemoryBreakdown, MemoryPeak]:
    """Return the measured and the simulated peak of a step of six rows."""
    record = workshop.run(recipe)
    measured = record.memory_breakdown
    assert measured is not None
    assert record.tokens is not None
    assert record.tokens.padded == 6 * WIDTH * record.steps
    assert (record.tokens.real == record.tokens.padded) == (recipe.data.padding == "free")
    with MemorySimulation(recipe, get_device_facts("cpu").capability, 1) as simulation:
        simulation.simulate_training(6, WIDTH, count_labels_per_row(record, 6))
    return measured, simulation.memory_tracker.find_peak()


def test_fast_points_cover_every_value() -> None:
    """Each method, architecture, precision, checkpointing mode and padding is in the fast tests."""
    assert set(SWEEP) >= FAST
    for axis in range(5):
        assert {point[axis] for point in FAST} == {point[axis] for point in SWEEP}


@pytest.mark.parametrize(("method", "architecture", "precision", "activations", "padding"), POINTS)
def test_simulated_peak_equals_that_of_a_real_step(  # noqa: PLR0917
    method: str,
    architecture: str,
    precision: str,
    activations: str,
    padding: str,
    workshop: Workshop,
    sources: dict[str, Files],
) -> None:
    """Total and bytes of each category are equal."""
    checkpointing = activations == "checkpointing"
    recipe = workshop.recipe(
        ONE_OF_EACH[method],
        architecture=architecture,
        data={"padding": padding, "max_length": WIDTH, "source": sources[padding]},
        train={"precision": precision, "gradient_checkpointing": checkpointing, "steps": 3, "global_batch_size": 6},
        profile=Profile(untimed_steps=2, memory_breakdown=True),
    )
    measured, simulated = measure_and_simulate(recipe, workshop)
    assert simulated.nbytes == pytest.approx(measured.peak_bytes, rel=1e-6)
    assert simulated.bytes_by_category == measured.bytes_by_category


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["stored", "checkpointing"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["gpt2_tied", "llama_untied"])
@pytest.mark.parametrize("method", [*PRESETS.values(), Embeddings(untie_head=True), LastBlocks(num_blocks=2)], ids=repr)
def test_simulated_peak_of_presets(  # noqa: PLR0917
    method: Method,
    architecture: str,
    precision: str,
    activations: str,
    workshop: Workshop,
    sources: dict[str, Files],
) -> None:
    """The same for each choice of the base model's parameters; the bytes depend on the lowest trained one."""
    recipe = workshop.recipe(
        method,
        architecture=architecture,
        data={"padding": "max_length", "max_length": WIDTH, "source": sources["max_length"]},
        train={
            "precision": precision,
            "gradient_checkpointing": activations == "checkpointing",
            "steps": 3,
            "global_batch_size": 6,
        },
        profile=Profile(untimed_steps=2, memory_breakdown=True),
    )
    measured, simulated = measure_and_simulate(recipe, workshop)
    assert (simulated.nbytes, simulated.bytes_by_category) == (measured.peak_bytes, measured.bytes_by_category)


@pytest.mark.parametrize(
    ("method", "quantization", "precision"),
    [
        (Lora(r=4), "nf4_double", "fp32"),
        (PromptTuning(num_virtual_tokens=5), "nf4", "fp32"),
        (Lora(r=4), "nf4", "bf16"),
        pytest.param(Lora(r=4), "nf4", "fp32", marks=pytest.mark.slow),
        pytest.param(PromptTuning(num_virtual_tokens=5), "nf4_double", "fp32", marks=pytest.mark.slow),
        pytest.param(PromptTuning(num_virtual_tokens=5), "nf4_double", "bf16", marks=pytest.mark.slow),
    ],
)
def test_simulated_peak_with_a_quantized_base(
    method: Method, quantization: str, precision: str, workshop: Workshop, sources: dict[str, Files]
) -> None:
    """It includes packed weights, scales, and weights dequantized in the backward pass."""
    recipe = workshop.recipe(
        method,
        model={"quantization": quantization},
        data={"padding": "max_length", "max_length": WIDTH, "source": sources["max_length"]},
        train={"steps": 3, "global_batch_size": 6, "precision": precision},
        profile=Profile(untimed_steps=2, memory_breakdown=True),
    )
    measured, simulated = measure_and_simulate(recipe, workshop)
    assert (simulated.nbytes, simulated.bytes_by_category) == (measured.peak_bytes, measured.bytes_by_category)


@pytest.mark.parametrize(
    "method",
    [
        Lora(r=4),
        pytest.param(Lora(r=4, bias="all"), marks=pytest.mark.slow),
        pytest.param(PromptTuning(num_virtual_tokens=5), marks=pytest.mark.slow),
        pytest.param(LastLayer(head="tied"), marks=pytest.mark.slow),
        pytest.param(LastLayer(), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_simulated_peak_by_type_of_frozen_weights(
    method: Method, dtype: str, workshop: Workshop, sources: dict[str, Files]
) -> None:
    """Under bf16, over a float32 base, whose casts are copies, and over a bf16 base with vectors in float32."""
    recipe = workshop.recipe(
        method,
        model={"dtype": dtype},
        data={"padding": "max_length", "max_length": WIDTH, "source": sources["max_length"]},
        train={"steps": 3, "global_batch_size": 6, "precision": "bf16"},
        profile=Profile(untimed_steps=2, memory_breakdown=True),
    )
    measured, simulated = measure_and_simulate(recipe, workshop)
    assert (simulated.nbytes, simulated.bytes_by_category) == (measured.peak_bytes, measured.bytes_by_category)


@pytest.mark.parametrize("chosen", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_simulated_peak_with_frozen_blocks(
    chosen: int, checkpointing: bool, workshop: Workshop, sources: dict[str, Files]
) -> None:
    """The lower or the upper of two blocks is trained."""
    optimizer = Lisa(num_blocks=1)
    recipe = workshop.recipe(
        Full(),
        optimizer=optimizer,
        data={"padding": "max_length", "max_length": WIDTH, "source": sources["max_length"]},
        train={
            "steps": 3,
            "global_batch_size": 6,
            "precision": "bf16",
            "gradient_checkpointing": checkpointing,
            "seed": next(seed for seed in range(20) if optimizer.choose_blocks(2, 0, seed) == {chosen}),
        },
        profile=Profile(untimed_steps=2, memory_breakdown=True),
    )
    measured, simulated = measure_and_simulate(recipe, workshop)
    assert simulated.nbytes == pytest.approx(measured.peak_bytes, rel=1e-6)
    assert simulated.bytes_by_category == measured.bytes_by_category


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST_OPTIMIZERS else pytest.mark.slow)
        for name in sorted(set(OPTIMIZERS) - {"paged_adamw8bit", "deepspeed_cpu_adam"})
    ],
)
def test_simulated_peak_of_an_optimizer_step(name: str, workshop: Workshop, sources: dict[str, Files]) -> None:
    """It includes states, temporaries and, with accumulation, gradients that are live at the peak."""
    optimizer = OPTIMIZER_CLASSES[name](**SMALL_KEYS.get(name, {}))
    recipe = workshop.recipe(
        method_for(optimizer),
        optimizer=optimizer,
        data={"padding": "max_length", "max_length": SHORT, "overlong": "drop", "source": sources["free"]},
        train={"steps": 3, "global_batch_size": 6, "micro_batch_size": 2, "precision": "bf16"},
        profile=Profile(untimed_steps=2, memory_breakdown=True),
    )
    record = workshop.run(recipe)
    measured = record.memory_breakdown
    assert measured is not None
    assert record.tokens is not None
    assert record.tokens.real == record.tokens.padded
    with MemorySimulation(recipe, get_device_facts("cpu").capability, 3, has_padding=False) as simulation:
        simulation.simulate_training(2, SHORT, count_labels_per_row(record, 6))
    simulated = simulation.memory_tracker.find_peak()
    # torchao's CPU scalars live slightly longer than in the simulation: 16 bytes.
    assert simulated.bytes_by_category == pytest.approx(measured.bytes_by_category, rel=1e-6, abs=16)
    assert (simulated.operation, simulated.step_part) == (measured.operation, measured.step_part)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["lora_plus", "lora_fa"])
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
@pytest.mark.parametrize("activations", ["stored", "checkpointing"])
def test_simulated_peak_of_variants_of_lora(
    optimizer: str, kind: str, activations: str, workshop: Workshop, sources: dict[str, Files]
) -> None:
    """A frozen A has no gradient, and its input is not stored, also with DoRA and gradient checkpointing."""
    section: Any = METHOD_KINDS[kind]
    recipe = workshop.recipe(
        section(r=4),
        architecture="llama_untied",
        optimizer={"kind": optimizer},
        data={"padding": "max_length", "max_length": WIDTH, "source": sources["max_length"]},
        train={
            "precision": "bf16",
            "gradient_checkpointing": activations == "checkpointing",
            "steps": 3,
            "global_batch_size": 6,
        },
        profile=Profile(untimed_steps=2, memory_breakdown=True),
    )
    measured, simulated = measure_and_simulate(recipe, workshop)
    assert simulated.nbytes == pytest.approx(measured.peak_bytes, rel=1e-6)
    assert simulated.bytes_by_category == measured.bytes_by_category
