"""Measure the loss on the recipe's general text before and after the training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from peftbench.distributed.sharding import release_gathered_weights
from peftbench.evaluation.general_text import encode_windows, read_general_text
from peftbench.methods.baselines import ZeroShot
from peftbench.record import Forgetting
from peftbench.run.evaluators import build_evaluator
from peftbench.training.state import preserve_rng_state

if TYPE_CHECKING:
    from peftbench.data.encode import Encoder
    from peftbench.recipe.schema import Recipe
    from peftbench.run.state import RunState
    from peftbench.training.build import AdaptedModel

IsOom = Callable[[BaseException], bool]


def measure_loss_before(state: RunState, adapted_model: AdaptedModel, encoder: Encoder, is_oom: IsOom) -> None:
    """Measure the loss of the model before its first step, without virtual tokens. Collective.

    No method changes the model's output before the first step, apart from virtual tokens. If the weights are sharded,
    the model can only be run with them, which is noted.
    """
    if state.recipe.evaluate.general_text is None:
        return
    if state.engine.shards_weights:
        untrained, recipe = adapted_model, state.recipe
        if state.recipe.method.virtual_tokens:
            state.notes.append(
                "the loss on the general text before the training includes the untrained virtual tokens, since the "
                "weights are sharded"
            )
    else:
        untrained = replace(adapted_model, model=adapted_model.base.model)
        recipe = state.recipe.model_copy(update={"method": ZeroShot()})
    with state.probe.phase("evaluate"), preserve_rng_state():
        forgetting = _measure(state, recipe, untrained, encoder, is_oom)
        release_gathered_weights(state.training.model if state.training is not None else adapted_model.model)
    state.forgetting = forgetting.model_copy(update={"loss_before": forgetting.loss_after, "loss_after": None})


def measure_loss_after(state: RunState, adapted_model: AdaptedModel, encoder: Encoder, is_oom: IsOom) -> None:
    """Measure the loss of the model that the run evaluates. Collective.

    For an untrained model both losses are equal. Without an own measurement, the loss before the training is that of
    the record of the training.
    """
    if state.recipe.evaluate.general_text is None:
        return
    before = state.forgetting or (state.trained_record.forgetting if state.trained_record is not None else None)
    forgetting = _measure(state, state.recipe, adapted_model, encoder, is_oom)
    if not state.recipe.method.is_trainable:
        forgetting = forgetting.model_copy(update={"loss_before": forgetting.loss_after})
    elif before is not None and before.text_fingerprint == forgetting.text_fingerprint:
        forgetting = forgetting.model_copy(update={"loss_before": before.loss_before})
    else:
        state.notes.append("the loss on the general text before the training is unknown; train again to measure it")
    state.forgetting = forgetting


def _measure(
    state: RunState, recipe: Recipe, adapted_model: AdaptedModel, encoder: Encoder, is_oom: IsOom
) -> Forgetting:
    """Return the loss of a model on the general text, as that after the training."""
    source = recipe.evaluate.general_text
    assert source is not None, "measured only with a text"
    text = read_general_text(source)
    windows, window_tokens = encode_windows(text.text, encoder)
    evaluator = build_evaluator(state, adapted_model, encoder, windows, is_oom, recipe=recipe)
    held_out = evaluator.compute_held_out_loss()
    state.notes += [note for note in evaluator.notes if note not in state.notes]
    return Forgetting(
        text=text.name,
        text_fingerprint=text.fingerprint,
        window_tokens=window_tokens,
        num_tokens=sum(held_out.label_counts),
        loss_after=held_out.loss,
    )
