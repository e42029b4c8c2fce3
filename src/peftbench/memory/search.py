"""Search for the largest micro-batch and the fastest memory-saving techniques that fit a budget."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from peftbench.common.units import format_bytes
from peftbench.data.batches import compute_micro_batching
from peftbench.errors import (
    BudgetError,
    CombinationError,
    DoesNotFitError,
    OptimizerError,
    PeftbenchError,
    did_you_mean,
)
from peftbench.memory.estimate import check_supported, estimate
from peftbench.memory.families import get_family, with_bundled_config
from peftbench.memory.launch_config import SINGLE_PROCESS, LaunchConfig
from peftbench.memory.lower_bound import compute_lower_bound
from peftbench.memory.plan import ModelFit, Strategy, UnplannedRun, sort_fastest_first
from peftbench.optim import OPTIMIZERS
from peftbench.profiler.peak_flops import get_peak_flops
from peftbench.training.auto_settings import resolve_auto_settings, resolve_task, with_model_keys

if TYPE_CHECKING:
    from peftbench.memory.devices import DeviceFacts
    from peftbench.memory.plan import Plan
    from peftbench.recipe.schema import Recipe

ConfigOverrides = dict[str, Any]


@dataclass(frozen=True)
class MemoryTarget:
    """The device and budget that a recipe must fit."""

    facts: DeviceFacts
    device_name: str
    """The name that the user gave, e.g. t4."""
    budget_bytes: int | None
    """Budget of each process; None if only the required memory is of interest."""
    launch_config: LaunchConfig = SINGLE_PROCESS

    @property
    def required_budget(self) -> int:
        """The budget in bytes.

        Raises:
            BudgetError: there is no budget.
        """
        if self.budget_bytes is None:
            raise BudgetError("No memory budget: pass --budget (e.g. 16GiB) or --device")
        return self.budget_bytes

    def resolve(self, recipe: Recipe) -> tuple[Recipe, list[str]]:
        """Resolve what depends on this device, the engine or the model's folder; return the recipe and notes.

        flash_attention_2 is planned as sdpa, which keeps the same tensors. ``model.dtype=auto`` stays, since it follows
        train.precision, which a technique may change.

        Raises:
            PeftbenchError: as in :func:`peftbench.training.auto_settings.resolve_auto_settings`.
        """
        notes: list[str] = []
        if recipe.model.attention == "flash_attention_2":
            recipe = with_model_keys(recipe, attention="sdpa")
            notes.append("flash_attention_2 is planned as sdpa")
        with contextlib.suppress(PeftbenchError):  # a plan needs no data
            recipe, resolved = resolve_task(recipe)
            notes += resolved
        if recipe.needs_resolution:
            with with_bundled_config(recipe.model) as local_model:
                capability = self.facts.capability
                found, resolved = resolve_auto_settings(recipe, self.launch_config.engine, capability, local_model)
            recipe = with_model_keys(found, dtype=recipe.model.dtype)
            notes += resolved
        return recipe, notes

    def has_room(self, recipe: Recipe) -> bool:
        """True unless weights, gradients and optimizer states alone exceed the budget. Simulates no step.

        Raises:
            PeftbenchError: the recipe cannot run on this target, or its memory is not modeled.
        """
        recipe, _ = self.resolve(recipe)
        check_supported(recipe, self.launch_config.engine, self.facts.device_type)
        return compute_lower_bound(recipe, self.launch_config) <= self.required_budget

    def plan(self, recipe: Recipe) -> Plan:
        """Return the plan of ``recipe`` on this target; raises like :func:`peftbench.memory.estimate.estimate`."""
        recipe, notes = self.resolve(recipe)
        if recipe.train.micro_batch_size == "auto":
            recipe, _ = choose_micro_batch(recipe, self)
        plan = estimate(recipe, self.facts, self.device_name, self.budget_bytes, self.launch_config)
        return plan.model_copy(update={"notes": (*notes, *plan.notes)})


@dataclass(frozen=True)
class Technique:
    """One way to save memory: the recipe keys that it changes, and its trade-off."""

    name: str
    overrides: dict[str, ConfigOverrides]
    """New values by recipe section and key."""
    tradeoff: str | None
    """Possible change of results; None if only the time changes."""
    numerics_change: int = 0
    """Change of the arithmetic: 0 none, 1 in the last digits, 2 tensors in fewer bits, 3 weights in fewer bits."""

    def is_applicable(self, recipe: Recipe, facts: DeviceFacts) -> bool:
        """True if it changes the recipe, and the method, optimizer and device support it."""
        if self.overrides.get("train", {}).get("precision") == "bf16" and (
            not facts.capability.has_bf16 or facts.device_type == "cpu"
        ):
            return False
        if self.name == "checkpointing" and recipe.method.has_frozen_backbone:
            return False
        optimizer = self.overrides.get("optimizer")
        if optimizer is not None and optimizer["kind"] not in recipe.optimizer.low_memory_variants:
            return False
        return self.apply(recipe) != recipe

    def apply(self, recipe: Recipe) -> Recipe:
        """Return the recipe with this technique applied."""
        changed = recipe
        for part, change in self.overrides.items():
            value = getattr(changed, part)
            if part == "optimizer":
                keys = value.model_dump(exclude={"kind"}) | {k: v for k, v in change.items() if k != "kind"}
                value = OPTIMIZERS[change["kind"]](**keys)
            else:
                value = value.model_copy(update=change)
            changed = changed.model_copy(update={part: value})
        return changed


def _build_optimizer_techniques() -> Iterator[Technique]:
    """Yield a technique for each low-memory variant of an optimizer."""
    for kind in dict.fromkeys(kind for optimizer in OPTIMIZERS.values() for kind in optimizer.low_memory_variants):
        variant = OPTIMIZERS[kind]
        name, overrides, tradeoff = kind, {"optimizer": {"kind": kind}}, f"moments in {variant.optim_bits} bits"
        numerics_change = 2
        if (dtype := variant.weight_dtype) != "fp32":
            name, tradeoff = f"{dtype}_weights", f"weights in {dtype}, rounded stochastically, and {tradeoff}"
            overrides["train"] = {"precision": dtype}
            numerics_change = 3
        yield Technique(name, overrides, tradeoff, numerics_change)


TECHNIQUES = (
    Technique("labels_only", {"train": {"logits": "labels_only"}}, None),
    Technique("checkpointing", {"train": {"gradient_checkpointing": True}}, None),
    Technique("fused_gelu", {"model": {"fused_gelu": True}}, "the last digit of GELU (2.4e-7)", 1),
    Technique("bf16", {"train": {"precision": "bf16"}}, "arithmetic in bf16", 2),
    *_build_optimizer_techniques(),
)
"""Ordered by how early one would try them. Names are unique."""


def list_micro_batch_sizes(recipe: Recipe, dp_world_size: int = 1) -> list[int]:
    """Return every possible micro-batch size of one process, in ascending order.

    Limits that split a step into the same number of micro-batches give the same size.
    """
    limits = range(1, recipe.train.global_batch_size + 1)
    return sorted({compute_micro_batching(recipe.train.global_batch_size, limit, dp_world_size)[1] for limit in limits})


def find_largest_fitting(
    sizes: Sequence[int], has_capacity: Callable[[int], bool], fits: Callable[[int], bool]
) -> int | None:
    """Return the largest of ``sizes`` (ascending) that ``fits``, or None.

    Tensor bytes grow with the size, so a binary search finds the largest size with ``has_capacity``. Reserved bytes
    need not grow: a smaller size can leave more fragments. From there the sizes are therefore tried one by one,
    in descending order.
    """
    least, most = 0, len(sizes)
    middle = most - 1  # often all fit
    while least < most:
        if has_capacity(sizes[middle]):
            least = middle + 1
        else:
            most = middle
        middle = (least + most) // 2
    return next((size for size in reversed(sizes[:least]) if fits(size)), None)


def plan_run(recipe: Recipe, build_target: Callable[[], MemoryTarget]) -> Plan | UnplannedRun:
    """Return the plan of one run of a suite, or the reason why it has none."""
    try:
        return build_target().plan(recipe)
    except PeftbenchError as error:
        return UnplannedRun(name=recipe.name, reason=str(error))


def check_verdicts(plans: Sequence[Plan | UnplannedRun]) -> None:
    """Check that every run is predicted to fit.

    Raises:
        DoesNotFitError: one is not, or has no estimate.
        BudgetError: there is no budget.
    """
    refused = [plan for plan in plans if isinstance(plan, UnplannedRun) or plan.verdict != "fits"]
    if not refused:
        return
    first = refused[0]
    if isinstance(first, UnplannedRun):
        raise DoesNotFitError(f"{first.name} has no estimate: {first.reason}")
    if first.verdict is None or first.budget_bytes is None:
        raise BudgetError("--check needs a budget; give --budget, e.g. 16GiB, or --device")
    raise DoesNotFitError(
        f"{first.name} in {format_bytes(first.budget_bytes)}: {first.verdict}; it needs "
        f"{' to '.join(format_bytes(size) for size in first.process_bytes)}"
    )


def find_evaluation_batch_size(recipe: Recipe, target: MemoryTarget) -> int | None:
    """Return the evaluation batch size, halved until it fits together with a training micro-batch of 1."""
    batch = recipe.evaluate.batch_size
    while batch:
        if target.plan(with_evaluation_batch(with_micro_batch(recipe, 1), batch)).verdict == "fits":
            return batch
        batch //= 2
    return None


def best_plan(recipe: Recipe, target: MemoryTarget) -> Plan | None:
    """Return the plan of the largest micro-batch that fits, or None if a micro-batch of 1 does not fit.

    The global batch size does not change. The evaluation batch size is halved until evaluation fits.

    Raises:
        EstimateUnavailableError: the memory of some part of the recipe is not modeled.
    """
    if not target.has_room(recipe):
        return None
    batch = find_evaluation_batch_size(recipe, target)
    if batch is None:
        return None
    recipe = with_evaluation_batch(recipe, batch)
    plans: dict[int, Plan] = {}

    def plan(size: int) -> Plan:
        if size not in plans:
            plans[size] = target.plan(with_micro_batch(recipe, size))
        return plans[size]

    def has_capacity(size: int) -> bool:
        candidate = plan(size)
        overhead = candidate.process_bytes[0] - candidate.reserved_bytes
        return candidate.peak.allocated_bytes + overhead <= target.required_budget

    largest = find_largest_fitting(
        list_micro_batch_sizes(recipe, target.launch_config.dp_world_size),
        has_capacity,
        lambda size: plan(size).verdict == "fits",
    )
    return None if largest is None else plans[largest]


def choose_micro_batch(recipe: Recipe, target: MemoryTarget) -> tuple[Recipe, str]:
    """Replace ``train.micro_batch_size=auto`` with the largest size that fits ``target``; return recipe and note.

    If even a micro-batch of 1 is not predicted to fit, the size is 1 and the run decides.

    Raises:
        BudgetError: the target has no budget.
        EstimateUnavailableError: the memory of some part of the recipe is not modeled.
    """
    size = f"{target.required_budget / 2**20:,.0f} MiB"
    plan = best_plan(recipe, target)
    if plan is None:
        return with_micro_batch(recipe, 1), "even a micro-batch of 1 is not predicted to fit; running with 1 anyway"
    note = f"train.micro_batch_size=auto resolved to {plan.micro_batch_size}, the largest size predicted to fit {size}"
    if plan.evaluation_batch_size != recipe.evaluate.batch_size:
        note += f", with evaluate.batch_size={plan.evaluation_batch_size}"
    return with_evaluation_batch(with_micro_batch(recipe, plan.micro_batch_size), plan.evaluation_batch_size), note


def with_evaluation_batch(recipe: Recipe, size: int) -> Recipe:
    """Return the recipe with this evaluation batch size, which changes no result."""
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"batch_size": size})})


def with_micro_batch(recipe: Recipe, size: int) -> Recipe:
    """Return the recipe with micro-batches of ``size`` examples."""
    keys = {"micro_batch_size": size, "micro_batch_tokens": None}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=keys)})


def list_technique_sets(recipe: Recipe, allowed: Sequence[str], facts: DeviceFacts) -> list[tuple[Technique, ...]]:
    """Return every set of allowed techniques that applies to the recipe and the device, smaller sets first.

    Raises:
        BudgetError: a technique is unknown.
    """
    known = {technique.name: technique for technique in TECHNIQUES}
    if unknown := [name for name in allowed if name not in known]:
        raise BudgetError(f"Unknown technique {unknown[0]!r}", did_you_mean(unknown[0], known))
    usable = [known[name] for name in known if name in allowed and known[name].is_applicable(recipe, facts)]
    sets = itertools.chain.from_iterable(itertools.combinations(usable, number) for number in range(len(usable) + 1))
    return [chosen for chosen in sets if _are_disjoint(chosen)]


def _are_disjoint(techniques: tuple[Technique, ...]) -> bool:
    """True if no two of them change the same recipe key."""
    keys = [(part, key) for technique in techniques for part, change in technique.overrides.items() for key in change]
    return len(keys) == len(set(keys))


def with_techniques(recipe: Recipe, techniques: Iterable[Technique]) -> Recipe:
    """Return the recipe with all techniques applied."""
    for technique in techniques:
        recipe = technique.apply(recipe)
    return recipe


def apply_strategy(recipe: Recipe, strategy: Strategy) -> Recipe:
    """Return the recipe with the techniques and batch sizes of ``strategy``."""
    known = {technique.name: technique for technique in TECHNIQUES}
    changed = with_techniques(recipe, [known[name] for name in strategy.techniques])
    return with_evaluation_batch(
        with_micro_batch(changed, strategy.plan.micro_batch_size), strategy.plan.evaluation_batch_size
    )


def strategies(recipe: Recipe, allowed_techniques: str, target: MemoryTarget) -> list[Strategy]:
    """Return the sets of techniques that fit, fastest first; ``allowed_techniques`` is "all" or a comma list.

    Raises:
        BudgetError: a technique is unknown.
        EstimateUnavailableError: the memory of some part of the recipe is not modeled.
    """
    names = (
        [technique.name for technique in TECHNIQUES]
        if allowed_techniques == "all"
        else [n for n in allowed_techniques.split(",") if n]
    )
    recipe, notes = target.resolve(recipe)
    sets = list_technique_sets(recipe, names, target.facts)
    bar = tqdm(sets, desc="simulating", unit="set", disable=None, leave=False)
    fitting = []
    for techniques in bar:
        try:
            fitting.append(find_strategy(recipe, techniques, target, notes))
        except (CombinationError, OptimizerError):  # the engine lacks a technique, or its library is not installed
            if not techniques:  # the recipe itself fails
                raise
    return sort_fastest_first([strategy for strategy in fitting if strategy is not None])


def find_largest_model(
    recipe: Recipe, family_name: str, allowed_techniques: str, target: MemoryTarget
) -> tuple[ModelFit, ...]:
    """Try the models of a family, from the largest down to the first that fits, and return all that were tried.

    Raises:
        BudgetError: a family or a technique is unknown.
        EstimateUnavailableError, ModelError: the recipe is not modeled, or its method does not support the family.
    """
    tried: list[ModelFit] = []
    for member in reversed(get_family(family_name).members):
        model = recipe.model.model_copy(update={"path": member.name, "revision": None})
        fitting = strategies(recipe.model_copy(update={"model": model}), allowed_techniques, target)
        fastest = fitting[0] if fitting else None
        tried.append(ModelFit(name=member.name, parameters=member.parameters, strategy=fastest))
        if fastest is not None:
            break
    return tuple(tried)


def find_strategy(
    recipe: Recipe, techniques: tuple[Technique, ...], target: MemoryTarget, notes: Sequence[str] = ()
) -> Strategy | None:
    """Return the largest micro-batch that fits ``target`` with these techniques, or None.

    ``recipe`` is resolved; ``notes`` are those of the resolution.
    """
    plan = best_plan(with_techniques(recipe, techniques), target)
    if plan is None:
        return None
    plan = plan.model_copy(update={"notes": (*notes, *plan.notes)})
    return build_strategy(recipe, techniques, plan, target)


def build_strategy(recipe: Recipe, techniques: tuple[Technique, ...], plan: Plan, target: MemoryTarget) -> Strategy:
    """Return the strategy of ``techniques`` whose plan on ``target`` is ``plan``."""
    changed = with_techniques(recipe, techniques)
    peak = get_peak_flops(target.facts.torch_name, changed.train.resolved_precision)
    keys = [
        (f"{part}.{key}", value)
        for technique in techniques
        for part, change in technique.overrides.items()
        for key, value in change.items()
    ]
    keys.append(("train.micro_batch_size", plan.micro_batch_size))
    if recipe.train.micro_batch_tokens is not None:
        keys.append(("train.micro_batch_tokens", "null"))
    if plan.evaluation_batch_size != recipe.evaluate.batch_size:
        keys.append(("evaluate.batch_size", plan.evaluation_batch_size))
    return Strategy(
        techniques=tuple(technique.name for technique in techniques),
        overrides=tuple(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys),
        tradeoffs=tuple(technique.tradeoff for technique in techniques if technique.tradeoff),
        numerics_changes=tuple(sorted((technique.numerics_change for technique in techniques), reverse=True)),
        plan=plan,
        step_seconds=_compute_step_seconds(plan, peak),
    )


def _compute_step_seconds(plan: Plan, peak_flops: float | None) -> float | None:
    if plan.step_time is not None:
        return plan.step_time.typical_seconds
    return plan.step_flops / peak_flops if plan.step_flops and peak_flops else None
