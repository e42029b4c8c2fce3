"""The cheapest change of a recipe with which it is predicted to fit its budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftbench.common.units import format_bytes
from peftbench.data.batches import compute_micro_batching
from peftbench.errors import CombinationError, EstimateUnavailableError, ModelError, OptimizerError
from peftbench.evaluation.metrics.selection import generates_text
from peftbench.memory.lower_bound import compute_lower_bound
from peftbench.memory.search import (
    TECHNIQUES,
    MemoryTarget,
    Technique,
    build_strategy,
    list_technique_sets,
    with_evaluation_batch,
    with_micro_batch,
    with_techniques,
)
from peftbench.methods.lora import Lora
from peftbench.training.auto_settings import with_model_keys

if TYPE_CHECKING:
    from peftbench.memory.plan import Plan, Strategy
    from peftbench.recipe.schema import Recipe

EVALUATION_PHASES = frozenset({"evaluate", "generate"})
_LEAST_NEW_TOKENS = 8
"""Least tokens of a generated text that are suggested."""
_FEW_SETS = 4
"""Up to this number, sets are tried one by one, without a check that any of them can fit."""
_LORA_TRADEOFF = "another method, whose learning rate must be chosen"
_NF4_TRADEOFF = "base weights in 4 bits"


@dataclass(frozen=True)
class Suggestion:
    """A change of a recipe that is predicted to fit, or what was tried."""

    sentence: str
    overrides: tuple[str, ...] = ()
    """Overrides of recipe keys, in command-line form; empty if nothing fits."""


def suggest_change(recipe: Recipe, target: MemoryTarget) -> Suggestion:
    """Return the cheapest change that is predicted to fit, or what was tried if nothing fits.

    Raises:
        BudgetError: the target has no budget.
        PeftbenchError: the recipe itself cannot run.
    """
    recipe, _ = target.resolve(recipe)
    strategy = find_cheapest_change(recipe, target)
    if strategy is not None:
        tradeoffs = f" (trade-off: {'; '.join(strategy.tradeoffs)})" if strategy.tradeoffs else ""
        upper = format_bytes(strategy.plan.process_bytes[1])
        overrides = _drop_unchanged(strategy.overrides, recipe, target)
        return Suggestion(
            f"with {' '.join(overrides)} the run is predicted to fit and to need at most {upper}{tradeoffs}", overrides
        )
    least = compute_lower_bound(recipe, target.launch_config)
    exceeds = least > target.required_budget
    needs = (
        f"; weights, gradients and optimizer states of this recipe take at least {format_bytes(least)}"
        if exceeds
        else ""
    )
    names = ("method.kind=lora", "model.quantization=nf4")
    others = [name for name in names if any(name in overrides for overrides, _, _ in _iter_variants(recipe))]
    tried = " and ".join([", ".join(["smaller micro-batches, memory techniques", *others[:-1]]), *others[-1:]])
    return Suggestion(f"{tried} were tried, and none is predicted to fit{needs}")


def _drop_unchanged(overrides: tuple[str, ...], recipe: Recipe, target: MemoryTarget) -> tuple[str, ...]:
    """Return the overrides without a micro-batch size that the recipe has already."""
    if recipe.train.micro_batch_size == "auto" or recipe.train.micro_batch_tokens is not None:
        return overrides
    unchanged = f"train.micro_batch_size={_get_micro_batch_size(recipe, target)}"
    return tuple(override for override in overrides if override != unchanged)


def suggest_evaluation(recipe: Recipe, target: MemoryTarget) -> Suggestion:
    """Return the cheapest change of ``evaluate`` with which a trained model is predicted to be evaluated.

    Raises:
        PeftbenchError: the recipe itself cannot run.
    """
    recipe, _ = target.resolve(recipe)
    config = recipe.evaluate
    variants: list[dict[str, int | tuple[str, ...]]] = [{"batch_size": 1}]
    if config.num_beams > 1:
        variants.append({"batch_size": 1, "num_beams": 1})
    tokens = config.max_new_tokens // 2
    while generates_text(recipe) and tokens >= _LEAST_NEW_TOKENS:
        variants.append({"batch_size": 1, "num_beams": 1, "max_new_tokens": tokens})
        tokens //= 2
    variants.append({"metrics": ()})
    for keys in variants:
        changed = {key: value for key, value in keys.items() if getattr(config, key) != value}
        if not changed:
            continue
        variant = recipe.model_copy(update={"evaluate": config.model_copy(update=changed)})
        needed = _compute_evaluation_bytes(target.plan(with_micro_batch(variant, 1)))
        if "metrics" not in changed and needed > target.required_budget:
            continue
        overrides = tuple(f"evaluate.{key}={'[]' if value == () else value}" for key, value in changed.items())
        return Suggestion(f"with {' '.join(overrides)} the evaluation is predicted to fit", overrides)
    return Suggestion("no change to the evaluation is predicted to fit the budget")


def _compute_evaluation_bytes(plan: Plan) -> int:
    """Return the most bytes that an evaluation without training needs: without optimizer states."""
    overhead = plan.cuda_context_bytes[1] + plan.workspace_bytes[1]
    return overhead + max(
        peak.allocated_bytes - peak.live_bytes_by_category.get("optimizer_state", 0)
        for phase, peak in plan.phase_peaks.items()
        if phase in EVALUATION_PHASES
    )


def find_cheapest_change(recipe: Recipe, target: MemoryTarget) -> Strategy | None:
    """Return the first change that fits, cheapest first; None if none fits.

    The order is: a smaller micro-batch; techniques that change no result; other techniques; LoRA; LoRA over 4-bit
    weights. Within each, smaller changes of the arithmetic come first, then fewer techniques.
    """
    free = [technique.name for technique in TECHNIQUES if technique.tradeoff is None]
    every = [technique.name for technique in TECHNIQUES]
    for overrides, tradeoffs, variant in _iter_variants(recipe):
        for allowed, tried in ((free, None), (every, free)):
            try:
                strategy = _find_first(variant, allowed, tried, target)
            except (CombinationError, EstimateUnavailableError, ModelError, OptimizerError):
                if variant is recipe:
                    raise
                break
            if strategy is not None:
                return strategy.model_copy(
                    update={
                        "overrides": (*overrides, *strategy.overrides),
                        "tradeoffs": (*tradeoffs, *strategy.tradeoffs),
                    }
                )
    return None


def _iter_variants(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Recipe]]:
    """Yield overrides, trade-offs and the changed recipe, cheapest first; the recipe itself comes first."""
    yield (), (), recipe
    overrides: tuple[str, ...] = ()
    tradeoffs: tuple[str, ...] = ()
    if not recipe.method.keeps_base_frozen:
        overrides, tradeoffs = ("method.kind=lora",), (_LORA_TRADEOFF,)
        if not recipe.method.freezes_weights:  # it ignored model.dtype, and a run has resolved it to fp32
            recipe = with_model_keys(recipe, dtype="auto")
        recipe = recipe.model_copy(update={"method": Lora()})
        if recipe.train.feature_cache is not None:  # it needs a method that trains only a head
            recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"feature_cache": None})})
            overrides = (*overrides, "train.feature_cache=null")
        yield overrides, tradeoffs, recipe
    can_quantize = recipe.model.quantization is None and recipe.model.init == "pretrained"
    if recipe.method.supports_quantized_base and can_quantize:
        quantized = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": "nf4"})})
        yield (*overrides, "model.quantization=nf4"), (*tradeoffs, _NF4_TRADEOFF), quantized


def _find_first(
    recipe: Recipe, allowed: Sequence[str], tried: Sequence[str] | None, target: MemoryTarget
) -> Strategy | None:
    """Return the strategy of the cheapest set of techniques that fits, None if none fits.

    Sets whose techniques are all in ``tried``, the empty set included, are skipped: none of them fits.
    """
    sets = sorted(
        (
            techniques
            for techniques in list_technique_sets(recipe, allowed, target.facts)
            if tried is None or not {technique.name for technique in techniques} <= set(tried)
        ),
        key=lambda techniques: (
            sorted((technique.numerics_change for technique in techniques if technique.numerics_change), reverse=True),
            len(techniques),
        ),
    )
    if len(sets) > _FEW_SETS and not any(_may_fit(recipe, techniques, target) for techniques in _list_maximal(sets)):
        return None
    for techniques in sets:
        try:
            plan = _find_plan(with_techniques(recipe, techniques), target)
        except (CombinationError, OptimizerError):
            if not techniques:  # the recipe itself fails
                raise
            continue  # the engine lacks a technique, or its library is not installed
        if plan is not None:
            return build_strategy(recipe, techniques, plan, target)
    return None


def _find_plan(recipe: Recipe, target: MemoryTarget) -> Plan | None:
    """Return a plan that fits, with micro-batch and evaluation batch halved as often as needed; None if none fits.

    The search of ``peftbench fit`` for the largest micro-batch would take several times as long.
    """
    smallest = _plan_smallest(recipe, target)
    if smallest is None:
        return None
    micro_batch = _get_micro_batch_size(recipe, target)
    evaluation_batch = recipe.evaluate.batch_size
    while micro_batch > 1 or evaluation_batch > 1:
        plan = target.plan(with_evaluation_batch(with_micro_batch(recipe, micro_batch), evaluation_batch))
        if plan.verdict == "fits":
            return plan
        if (plan.peak_phase in EVALUATION_PHASES and evaluation_batch > 1) or micro_batch == 1:
            evaluation_batch = max(1, evaluation_batch // 2)
        else:
            micro_batch = max(1, micro_batch // 2)
    return smallest


def _get_micro_batch_size(recipe: Recipe, target: MemoryTarget) -> int:
    size = None if recipe.train.micro_batch_size == "auto" else recipe.train.resolved_micro_batch_size
    return compute_micro_batching(recipe.train.global_batch_size, size, target.launch_config.dp_world_size)[1]


def _plan_smallest(recipe: Recipe, target: MemoryTarget) -> Plan | None:
    """Return the plan with micro-batch and evaluation batch of 1, None if it does not fit."""
    if not target.has_room(recipe):
        return None
    plan = target.plan(with_evaluation_batch(with_micro_batch(recipe, 1), 1))
    return plan if plan.verdict == "fits" else None


def _list_maximal(sets: Sequence[tuple[Technique, ...]]) -> list[tuple[Technique, ...]]:
    """Return the sets that no other set contains, largest first: if none of them fits, no set does."""
    names = [{technique.name for technique in techniques} for techniques in sets]
    maximal = [
        techniques for techniques, own in zip(sets, names, strict=True) if not any(own < other for other in names)
    ]
    return sorted(maximal, key=len, reverse=True)


def _may_fit(recipe: Recipe, techniques: tuple[Technique, ...], target: MemoryTarget) -> bool:
    """True if the recipe fits with these techniques and the smallest batches, or if they do not run together."""
    try:
        return _plan_smallest(with_techniques(recipe, techniques), target) is not None
    except (CombinationError, OptimizerError):
        return True  # smaller sets may run
