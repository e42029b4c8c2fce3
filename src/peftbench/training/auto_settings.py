"""Resolve the recipe keys whose value ``auto`` depends on the device: ``train.precision`` and ``model.attention``.

``train.micro_batch_size=auto`` depends on the memory estimate too and is resolved in ``run/oom.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peftbench.distributed import launcher_env
from peftbench.distributed.accelerator import resolve_engine
from peftbench.distributed.device_capability import detect_device_capability
from peftbench.distributed.precision import resolve_precision, with_precision
from peftbench.modeling.attention_implementation import select_attention
from peftbench.modeling.loading import load_config, resolve_model_path

if TYPE_CHECKING:
    from peftbench.distributed.device_capability import DeviceCapability
    from peftbench.distributed.engines import EngineKind
    from peftbench.recipe.schema import Model, Recipe


def resolve_for_launch(recipe: Recipe) -> tuple[Recipe, str | None]:
    """Resolve the recipe for this process's device and the launcher's engine; see :func:`resolve_auto_settings`.

    Raises:
        EngineError, MissingFileError: the engine is not supported.
        ModelNotFoundError, HubUnreachableError: as in :func:`resolve_auto_settings`.
    """
    if not recipe.has_auto_settings:
        return recipe, None
    # The engine does not depend on the micro-batch size, which may be auto too.
    any_size = recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch_size": None})})
    engine, _ = resolve_engine(any_size, Path(), launcher_env.get_world_size())
    return resolve_auto_settings(recipe, engine, detect_device_capability())


def resolve_auto_settings(
    recipe: Recipe, engine: EngineKind, device: DeviceCapability, local_model: Model | None = None
) -> tuple[Recipe, str | None]:
    """Return the recipe with both keys resolved, and a note that gives the values and the reasons; None without auto.

    ``local_model`` replaces the recipe's model where its config is read.

    Raises:
        ModelNotFoundError, HubUnreachableError: attention is auto, and the model's config was not found.
    """
    choices = []
    if recipe.train.precision == "auto":
        precision, reason = resolve_precision(recipe, engine, device)
        recipe = with_precision(recipe, precision)
        choices.append(f"train.precision is {precision} ({reason})")
    if recipe.model.attention == "auto" and recipe.method.needs_model:
        model_config = local_model or recipe.model
        config, path = load_config(model_config), resolve_model_path(model_config)
        attention, reason = select_attention(
            model_config, config, path, flash_obstacle=_find_flash_obstacle(recipe, device)
        )
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"attention": attention})})
        choices.append(f"model.attention is {attention} ({reason})")
    return recipe, f"auto: {', '.join(choices)}" if choices else None


def _find_flash_obstacle(recipe: Recipe, device: DeviceCapability) -> str | None:
    """Return why flash attention cannot run on the device in the recipe's precision, None if it can."""
    if not device.has_bf16 or device.device_type == "cpu":
        return "flash attention needs a GPU of compute capability 8.0 or newer"
    if recipe.train.resolved_precision == "fp32":
        return "flash attention does not support fp32"
    if device.has_flash_attention:
        return None
    return "an estimate plans flash attention as sdpa" if device.is_planned else "flash-attn is not installed"
