"""Build a recipe's architecture on the meta device, and check that its method can be planned."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from peftbench.common.dtypes import TORCH_DTYPES
from peftbench.common.libraries import imports_without_gc
from peftbench.errors import EstimateUnavailableError
from peftbench.memory.families import with_bundled_config
from peftbench.memory.simulation.model import build_meta_model
from peftbench.memory.simulation.repeating_layers import KeptLayers, list_transformer_layers
from peftbench.modeling.loading import load_config
from peftbench.training.build import add_method, get_loaded_dtype
from peftbench.training.recipe_trial import try_recipe

if TYPE_CHECKING:
    from torch import nn

    from peftbench.modeling.loading import LoadedModel
    from peftbench.recipe.schema import Recipe
    from peftbench.training.trial import Trial


def check_buildable(recipe: Recipe) -> None:
    """Check that the recipe's base model can be built, before anything is derived from its config.

    Raises:
        ModelError: its config is invalid.
    """
    build_base(recipe)


def build_layers(recipe: Recipe, kept_layers: KeptLayers | None = None) -> list[nn.Module]:
    """Return the transformer layers of the recipe's model on the meta device, with the method added.

    Raises:
        PeftbenchError: the recipe does not fit this model.
    """
    with imports_without_gc():
        base = build_base(recipe, kept_layers)
        # On the meta device no weights are initialized; some types of peft need values of their own weights.
        with nullcontext() if recipe.method.needs_trial else torch.device("meta"):
            add_method(recipe, base)
    return list_transformer_layers(base.model)


def build_base(recipe: Recipe, kept_layers: KeptLayers | None = None) -> LoadedModel:
    """Build the recipe's base model on the meta device, with all layers or some."""
    return build_meta_model(
        recipe.model,
        TORCH_DTYPES[recipe.train.resolved_precision],
        TORCH_DTYPES[get_loaded_dtype(recipe)],
        kept_layers=None if kept_layers is None else kept_layers.indices,
    )


def check_plannable(recipe: Recipe) -> Trial:
    """Check that the recipe's method can be applied without values of weights; return its trial on the whole model.

    Raises:
        EstimateUnavailableError: it cannot.
        UnsupportedModelError: it does not work on this architecture, or not with the recipe's settings.
    """
    with with_bundled_config(recipe.model) as model_config:
        trial = try_recipe(recipe, load_config(model_config))
    if trial.meta_problem is not None:
        raise EstimateUnavailableError(
            f"the memory of method.kind={recipe.method.kind} cannot be planned without the values of the weights: "
            f"{trial.meta_problem}"
        )
    return trial
