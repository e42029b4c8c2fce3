"""Resolve ``train.precision=auto`` for a device and an engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from peftbench.distributed.accelerator import build_combination
from peftbench.distributed.compatibility import find_blocking_rule

if TYPE_CHECKING:
    from peftbench.distributed.device_capability import DeviceCapability
    from peftbench.distributed.engines import EngineKind
    from peftbench.recipe.schema import Precision, Recipe


def resolve_precision(recipe: Recipe, engine: EngineKind, device: DeviceCapability) -> tuple[Precision, str]:
    """Return the precision that ``train.precision=auto`` means, and the reason as a clause.

    It is the first in the device's order of preference that runs with the engine and the recipe's optimizer. If none
    runs, it is the first; the compatibility check then refuses it and gives the reason.
    """
    ranked = list(_iter_preferences(recipe, device))
    refusal = ""
    for precision, reason in ranked:
        combination = build_combination(with_precision(recipe, precision), engine)
        rule = find_blocking_rule(combination, device.device_type)
        if rule is None:
            return precision, refusal or reason
        refusal = refusal or f"{rule.describe_refused(combination, device.device_type)}: {rule.reason}"
    return ranked[0]


def with_precision(recipe: Recipe, precision: Precision) -> Recipe:
    """Return the recipe with this precision."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})


def _iter_preferences(recipe: Recipe, device: DeviceCapability) -> Iterator[tuple[Precision, str]]:
    """Yield precisions, best first, each with the reason to give if it is selected."""
    if device.device_type == "cpu":
        yield from _iter_cpu_preferences(recipe, device)
        return
    major, minor = device.compute_capability or (0, 0)
    if device.is_assumed:
        yield "bf16", "no device was named, and one that multiplies bf16 natively is assumed"
    elif device.has_bf16:
        yield "bf16", f"compute capability {major}.{minor} multiplies bf16 natively"
    elif major >= 7:  # Volta and Turing: tensor cores for fp16 only
        yield "fp16", f"compute capability {major}.{minor} multiplies fp16 natively, but not bf16"
    yield "fp32", f"compute capability {major}.{minor} multiplies neither bf16 nor fp16 fast"


def _iter_cpu_preferences(recipe: Recipe, device: DeviceCapability) -> Iterator[tuple[Precision, str]]:
    if device.is_planned:
        yield "fp32", "on CPU only fp32 has a memory estimate"
    elif recipe.train.micro_batch_size == "auto" or recipe.budget.memory is not None:
        key = "budget.memory" if recipe.budget.memory is not None else "train.micro_batch_size=auto"
        yield "fp32", f"{key} needs a memory estimate, and on CPU only fp32 has one"
    elif not device.has_bf16:
        yield "fp32", "this CPU has no bf16 instructions"
    yield "bf16", "this CPU has bf16 instructions"
    yield "fp32", "this CPU has no bf16 instructions"
