"""Simulate the phases of a run, with a few layers where the layers repeat."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftbench.evaluation.metrics.selection import generates_text
from peftbench.memory.families import with_bundled_config
from peftbench.memory.launch_config import SINGLE_PROCESS, LaunchConfig
from peftbench.memory.simulation.architecture import build_layers, check_plannable
from peftbench.memory.simulation.layer_expansion import NUM_UNITS, UnequalLayersError, extrapolate_events
from peftbench.memory.simulation.repeating_layers import LayerPattern, describe_module, find_pattern
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.methods.small_copy import identify
from peftbench.modeling.loading import load_config
from peftbench.timing.operations import OperationCounts, extrapolate

if TYPE_CHECKING:
    from peftbench.distributed.device_capability import DeviceCapability
    from peftbench.memory.simulation.repeating_layers import KeptLayers
    from peftbench.profiler.memory_breakdown import MemoryEvent
    from peftbench.recipe.schema import Recipe


@dataclass(frozen=True)
class RunSize:
    """Sizes of a run's batches."""

    rows: int
    """Rows of a micro-batch."""
    sequence_length: int
    """Tokens of a row, padding included."""
    labeled_tokens: int
    """Labeled tokens of a row."""
    num_micro_batches: int
    """Micro-batches of a step of one process."""
    rows_per_step: int
    """Rows of a step of one process."""


@dataclass(frozen=True)
class SimulatedRun:
    """Allocations and operations of one process of a run."""

    events: list[MemoryEvent]
    step_flops: int | None
    """FLOPs of an optimizer step; None if unknown."""
    operation_counts: OperationCounts
    """Operations of an optimizer step."""
    notes: tuple[str, ...]
    num_simulated_layers: int | None = None
    """Layers that were simulated if not all were, and whose events were repeated; else None."""


def simulate_run(
    recipe: Recipe, device: DeviceCapability, size: RunSize, launch_config: LaunchConfig = SINGLE_PROCESS
) -> SimulatedRun:
    """Simulate training, evaluation and, if the recipe generates, generation.

    Where the layers repeat, models with three and four units of layers are simulated and extrapolated.

    Raises:
        EstimateUnavailableError: the memory of some part of the recipe is not modeled; the message names the part.
    """
    simulator = _Simulator(recipe, device, size, launch_config)
    pattern = find_layer_pattern(recipe, launch_config)
    if pattern is not None:
        with suppress(UnequalLayersError):
            return _simulate_few_layers(simulator, pattern)
    simulation = simulator.build()
    flops = simulator.count_flops(simulation)
    events = simulator.run(simulation)
    return SimulatedRun(
        events,
        simulation.counted_flops if flops is None else flops,
        simulation.operation_log.count_step(simulation.accumulation),
        simulation.notes,
    )


def find_layer_pattern(recipe: Recipe, launch_config: LaunchConfig = SINGLE_PROCESS) -> LayerPattern | None:
    """Return how the layers of the recipe's model repeat; None if they do not, or not often enough to save work.

    DeepSpeed and FSDP flatten the parameters of all layers, and LISA trains some layers only: there is no pattern.

    Raises:
        EstimateUnavailableError: the method cannot be planned.
        PeftbenchError: the recipe does not fit this model.
    """
    if not launch_config.is_single_process or recipe.optimizer.freezes_blocks:
        return None
    check_plannable(recipe)
    key = _identify_architecture(recipe)
    if key not in _patterns:
        _patterns[key] = _find_verified_pattern(recipe)
    return _patterns[key]


_patterns: dict[tuple[str, ...], LayerPattern | None] = {}


def _identify_architecture(recipe: Recipe) -> tuple[str, ...]:
    """Return what determines the layers of a recipe's model."""
    with with_bundled_config(recipe.model) as model_config:
        config = identify(load_config(model_config))
    sections = (recipe.model.model_dump_json(), recipe.method.model_dump_json(), recipe.optimizer.model_dump_json())
    return (config, *sections, recipe.train.resolved_precision)


def _find_verified_pattern(recipe: Recipe) -> LayerPattern | None:
    """Return the pattern of the whole model, unless models with few layers have other layers."""
    layers = build_layers(recipe)
    with with_bundled_config(recipe.model) as model_config:
        if getattr(load_config(model_config), "num_hidden_layers", None) != len(layers):
            return None
    pattern = find_pattern(layers)
    if pattern is None:
        return None
    for num_units in (NUM_UNITS - 1, NUM_UNITS):
        kept = pattern.keep_units(num_units)
        few = build_layers(recipe, kept)
        expected = [describe_module(layers[index]) for index in kept.indices]
        if [describe_module(layer) for layer in few] != expected:  # e.g. a method that names layers by their index
            return None
    return pattern


@dataclass(frozen=True)
class _Simulator:
    """Builds and runs simulations of one run."""

    recipe: Recipe
    device: DeviceCapability
    size: RunSize
    launch_config: LaunchConfig

    def build(self, kept_layers: KeptLayers | None = None) -> MemorySimulation:
        """Build the model and apply the method."""
        return MemorySimulation(
            self.recipe,
            self.device,
            self.size.num_micro_batches,
            has_padding=self.size.rows > 1,
            launch_config=self.launch_config,
            kept_layers=kept_layers,
        )

    def count_flops(self, simulation: MemorySimulation) -> int | None:
        """Return the FLOPs of a step, None without a closed form."""
        return simulation.step_flops(self.size.rows_per_step, self.size.sequence_length, self.size.labeled_tokens)

    def run(self, simulation: MemorySimulation) -> list[MemoryEvent]:
        """Simulate all phases and return their events."""
        evaluate, width = self.recipe.evaluate, self.size.sequence_length
        with simulation:
            simulation.simulate_training(self.size.rows, width, self.size.labeled_tokens)
            simulation.simulate_evaluation(evaluate.batch_size, width, self.size.labeled_tokens)
            if generates_text(self.recipe):
                num_sequences = evaluate.batch_size * evaluate.num_beams
                simulation.simulate_generation(num_sequences, width - evaluate.max_new_tokens, evaluate.max_new_tokens)
        return list(simulation.memory_tracker.iter_events())


def _simulate_few_layers(simulator: _Simulator, pattern: LayerPattern) -> SimulatedRun:
    """Simulate models with three and four units and extrapolate.

    Raises:
        UnequalLayersError: the events do not repeat.
    """
    events, flops, counts = [], [], []
    for num_units in (NUM_UNITS - 1, NUM_UNITS):
        kept = pattern.keep_units(num_units)
        simulation = simulator.build(kept)
        closed_form = simulator.count_flops(simulation)
        events.append(simulator.run(simulation))
        flops.append(simulation.counted_flops if closed_form is None else closed_form)
        counts.append(simulation.operation_log.count_step(simulation.accumulation))
    few, some = flops
    added = pattern.num_units - NUM_UNITS
    return SimulatedRun(
        extrapolate_events(events[1], events[0], pattern.num_units),
        None if few is None or some is None else some + added * (some - few),
        extrapolate(counts[0], counts[1], added),
        simulation.notes,
        len(kept.indices),
    )
