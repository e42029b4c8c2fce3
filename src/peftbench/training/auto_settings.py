"""Resolve the recipe keys that depend on the device, the data or the model's folder before a run or plan starts.

``task.kind=auto`` depends on the columns of the data.
``train.precision=auto`` and ``model.attention=auto`` depend on the device, and ``model.dtype=auto`` follows the
precision. ``model.quantization`` becomes the kind of weights that were saved quantized. ``train.micro_batch_size=auto``
depends on the memory estimate too and is resolved in ``run/oom.py``.
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
from peftbench.modeling.quantization import resolve_quantization
from peftbench.tasks import TASKS
from peftbench.tasks.auto import select_task

if TYPE_CHECKING:
    from peftbench.distributed.device_capability import DeviceCapability
    from peftbench.distributed.engines import EngineKind
    from peftbench.recipe.schema import Model, Recipe


def resolve_for_launch(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Resolve the recipe for this process's device and the launcher's engine; see :func:`resolve_auto_settings`.

    Raises:
        EngineError, MissingFileError: the engine is not supported.
        PeftbenchError: as in :func:`resolve_auto_settings`.
    """
    if not recipe.needs_resolution:
        return recipe, []
    recipe, task_notes = resolve_task(recipe)
    # The engine does not depend on the micro-batch size, which may be auto too.
    any_size = recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch_size": None})})
    engine, _ = resolve_engine(any_size, Path(), launcher_env.get_world_size())
    recipe, notes = resolve_auto_settings(recipe, engine, detect_device_capability())
    return recipe, [*task_notes, *notes]


def resolve_task(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe with ``task.kind=auto`` resolved, and a note that gives the task and its columns.

    Raises:
        OutOfRangeError: the columns are those of no task.
        DataError: the names of the columns cannot be read.
    """
    if recipe.task.is_resolved:
        return recipe, []
    source, split = recipe.data.source, "train" if recipe.method.is_trainable else recipe.evaluate.split
    if source.implied_task is not None:
        task = TASKS[source.implied_task].with_defaults()
    else:
        task = select_task(source.read_column_names(split), TASKS, f"the {split} split")
    columns = ", ".join(dict.fromkeys(task.columns.values()))
    return recipe.model_copy(update={"task": task}), [f"auto: task.kind is {task.kind} (columns {columns})"]


def resolve_auto_settings(
    recipe: Recipe, engine: EngineKind, device: DeviceCapability, local_model: Model | None = None
) -> tuple[Recipe, list[str]]:
    """Return the recipe with these keys resolved, and notes that give the changed values and the reasons.

    ``local_model`` replaces the recipe's model where its config is read.

    Raises:
        ModelNotFoundError, HubUnreachableError: the model's config was not found.
        OutOfRangeError, UnsupportedModelError: as in :func:`peftbench.modeling.quantization.resolve_quantization`.
    """
    choices, notes = [], []
    if recipe.train.precision == "auto":
        precision, reason = resolve_precision(recipe, engine, device)
        recipe = with_precision(recipe, precision)
        choices.append(f"train.precision is {precision} ({reason})")
    if recipe.model.dtype == "auto" and recipe.frozen_dtype != "fp32" and engine.offloads_to_nvme:
        recipe = with_model_keys(recipe, dtype="fp32")
        choices.append("model.dtype is fp32 (DeepSpeed swaps all weights to disk through buffers of one type)")
    recipe = recipe.with_resolved_dtype()
    if not recipe.method.needs_model:
        return recipe, [f"auto: {', '.join(choices)}"] if choices else []
    model_config = local_model or recipe.model
    config, path = load_config(model_config), resolve_model_path(model_config)
    quantization = resolve_quantization(model_config, config, path)
    if quantization != recipe.model.quantization:
        recipe = with_model_keys(recipe, quantization=quantization)
        notes.append(
            f"model.quantization is {quantization}, because the weights are stored in that format (quantization_config "
            "in config.json)"
        )
    if recipe.model.attention == "auto":
        attention, reason = select_attention(
            model_config, config, path, flash_obstacle=_find_flash_obstacle(recipe, device)
        )
        recipe = with_model_keys(recipe, attention=attention)
        choices.append(f"model.attention is {attention} ({reason})")
    return recipe, [*([f"auto: {', '.join(choices)}"] if choices else []), *notes]


def with_model_keys(recipe: Recipe, **keys: object) -> Recipe:
    """Return the recipe with some keys of its section ``model`` replaced."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=keys)})


def _find_flash_obstacle(recipe: Recipe, device: DeviceCapability) -> str | None:
    """Return why flash attention cannot run on the device in the recipe's precision, None if it can."""
    if not device.has_bf16 or device.device_type == "cpu":
        return "flash attention needs a GPU of compute capability 8.0 or newer"
    if recipe.train.resolved_precision == "fp32":
        return "flash attention does not support fp32"
    if device.has_flash_attention:
        return None
    return "an estimate plans flash attention as sdpa" if device.is_planned else "flash-attn is not installed"
