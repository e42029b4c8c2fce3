"""Compute a method's initial values before the first step, as a phase of its own, or read those of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from peftbench.distributed.collectives import broadcast_from_main
from peftbench.run.checkpointing import INITIAL_VALUES_KEY, build_checkpoint_manager
from peftbench.training.initialization import compute_initial_values, set_initial_values

if TYPE_CHECKING:
    from peftbench.data.batches import EncodedExamples
    from peftbench.data.collate import MicroBatch
    from peftbench.methods.initialization import InitialValues
    from peftbench.run.state import RunState
    from peftbench.training.build import AdaptedModel


def initialize_model(
    state: RunState,
    adapted_model: AdaptedModel,
    examples: EncodedExamples,
    pad_token_id: int,
    on_batch: Callable[[], None],
) -> AdaptedModel:
    """Set the initial values that the method computes, if any; return the model with its new counts. Collective.

    All processes compute the values from the same examples and use those of the main process. A resumed run uses those
    of its checkpoint. ``on_batch`` is called before each forward pass, and may end the run.

    Raises:
        OutOfRangeError, UnsupportedModelError: they cannot be computed.
    """
    recipe = state.recipe
    if recipe.method.initialization is None:
        return adapted_model
    manager = build_checkpoint_manager(state, adapted_model)
    with state.probe.phase("initialize"):
        values: InitialValues | None = broadcast_from_main(
            state.accelerator, lambda: manager.read_latest(INITIAL_VALUES_KEY)
        )
        if values is None:
            own_values = _compute(state, adapted_model, examples, pad_token_id, on_batch)
            values = broadcast_from_main(state.accelerator, lambda: own_values)
        state.adapted_model = set_initial_values(recipe, adapted_model, values)
    return state.adapted_model


def _compute(
    state: RunState,
    adapted_model: AdaptedModel,
    examples: EncodedExamples,
    pad_token_id: int,
    on_batch: Callable[[], None],
) -> InitialValues:
    """Compute the values with a progress bar; add a note on what was read."""
    num_passes = num_tokens = 0
    is_hidden = None if state.accelerator.is_main_process else True
    with tqdm(desc="initializing", unit=" passes", disable=is_hidden, leave=None) as bar:

        def count(batch: MicroBatch) -> None:
            nonlocal num_passes, num_tokens
            on_batch()
            num_passes, num_tokens = num_passes + 1, num_tokens + sum(batch.lengths)
            bar.update()

        values = compute_initial_values(
            state.recipe, adapted_model, examples, state.context, pad_token_id=pad_token_id, on_batch=count
        )
    if num_passes:
        state.notes.append(
            f"initial values were computed in {num_passes:,} forward passes over {num_tokens:,} tokens of training "
            "examples (phase initialize)"
        )
    return values
