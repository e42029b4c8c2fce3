"""The rows of ``peftbench fit MODEL``: fine-tuning methods, each as overrides of one recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftbench.errors import PeftbenchError, UnknownKeyError
from peftbench.recipe.loader import merge_configs, parse_recipe, to_inline_yaml

if TYPE_CHECKING:
    from peftbench.recipe.schema import Recipe

GLOBAL_BATCH_SIZE = 16
"""Examples per optimizer step of a written recipe."""
_FULL_RATE, _ADAPTER_RATE = "optimizer.learning_rate=5e-5", "optimizer.learning_rate=2e-4"
"""Rates of recipes/gsm8k_smollm2, with their sources there."""


@dataclass(frozen=True)
class FitMethod:
    """One row: a method with its optimizer, its engine and the format of its weights."""

    name: str
    title: str
    """Name for a table."""
    overrides: tuple[str, ...]
    """Overrides of recipe keys, in command-line form."""
    engine: str | None = None
    """Name of its accelerate config; None for the launch that the user requests."""


FIT_METHODS = (
    FitMethod("full", "full", ("method.kind=full", _FULL_RATE)),
    FitMethod("full_8bit", "full, 8-bit Adam", ("method.kind=full", "optimizer.kind=adamw8bit", _FULL_RATE)),
    FitMethod(
        "full_paged_8bit",
        "full, paged 8-bit Adam",
        ("method.kind=full", "optimizer.kind=paged_adamw8bit", _FULL_RATE),
    ),
    FitMethod(
        "full_bf16_weights",
        "full, bf16 weights",
        ("method.kind=full", "optimizer.kind=adamw8bit_bf16", "train.precision=bf16", _FULL_RATE),
    ),
    FitMethod("full_zero2_offload", "full, ZeRO-2 offload", ("method.kind=full", _FULL_RATE), "zero2_offload"),
    FitMethod("full_zero3_offload", "full, ZeRO-3 offload", ("method.kind=full", _FULL_RATE), "zero3_offload"),
    FitMethod("lora", "LoRA", ("method.kind=lora", _ADAPTER_RATE)),
    FitMethod("qlora", "QLoRA", ("method.kind=lora", "model.quantization=nf4", _ADAPTER_RATE)),
    FitMethod("dora", "DoRA", ("method.kind=lora", "method.use_dora=true", _ADAPTER_RATE)),
    FitMethod(
        "prompt_tuning",
        "prompt tuning",
        (
            "method.kind=prompt_tuning",
            "method.num_virtual_tokens=20",
            "method.prompt_tuning_init=SAMPLE_VOCAB",
            "optimizer.learning_rate=0.03",  # as in recipes/methods
        ),
    ),
    FitMethod(
        "last_layer",
        "last layer",
        ("method.kind=last_layer", "train.gradient_checkpointing=false", "optimizer.learning_rate=1e-3"),
    ),
)
"""All rows, in the order of the table. Rows differ in these overrides alone."""


@dataclass(frozen=True)
class FitRequest:
    """The model, the examples, and overrides for all rows."""

    model_path: str
    """Model that is written to recipes: a folder, or a name on the Hub."""
    config_path: str
    """Model whose config is read: the same, or a folder that has nothing but a config."""
    overrides: tuple[str, ...] = ()
    data_file: str | None = None
    """File with examples; None for rows of random words, all labeled."""

    def build_recipe(self, method: FitMethod) -> Recipe:
        """Return the recipe of a row; the user's overrides come last.

        Raises:
            RecipeError: an override does not belong to this row, or its value is invalid.
        """
        overrides = [*self.list_base_overrides(self.config_path), *method.overrides]
        return parse_recipe(merge_configs([], overrides, [], self.overrides))

    def list_base_overrides(self, path: str) -> list[str]:
        """Return the overrides that all rows share, for the model at ``path``."""
        source = ["data.source.kind=synthetic", "task.kind=text"]
        if self.data_file is not None:
            name = to_inline_yaml(self.data_file)
            source = ["data.source.kind=files", f"data.source.train={name}", f"data.source.test={name}"]
        return [
            "name=fit",
            f"model.path={to_inline_yaml(path)}",
            *source,
            "data.overlong=drop",
            f"train.global_batch_size={GLOBAL_BATCH_SIZE}",
            "train.epochs=1",
            "train.gradient_checkpointing=true",
            "evaluate.metrics=[]",
            "evaluate.max_new_tokens=1",  # nothing is generated, and no row needs room for it
        ]


def build_any_recipe(request: FitRequest) -> Recipe:
    """Return the recipe of the first row that accepts the overrides: keys of one method are invalid for the others.

    Raises:
        RecipeError: no row accepts them.
    """
    errors: list[PeftbenchError] = []
    for method in FIT_METHODS:
        try:
            return request.build_recipe(method)
        except PeftbenchError as error:
            errors.append(error)
    raise select_error(errors)


def select_error(errors: Sequence[PeftbenchError]) -> PeftbenchError:
    """Return the first error that is not about a key of other methods, else the first one."""
    return next((error for error in errors if not isinstance(error, UnknownKeyError)), errors[0])
