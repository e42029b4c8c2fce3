"""What fits: the largest micro-batch, and ways of saving memory, the fastest first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from peftbench.data.batches import compute_micro_batching
from peftbench.errors import (
    BudgetError,
    BudgetTooSmallError,
    CombinationError,
    OptimizerError,
    PeftbenchError,
    did_you_mean,
)
from peftbench.memory.estimate import estimate
from peftbench.memory.families import get_family
from peftbench.memory.launch_config import SINGLE_PROCESS, LaunchConfig
from peftbench.memory.plan import ModelFit, Strategy, UnplannedRun, sort_fastest_first
from peftbench.optim import OPTIMIZERS
from peftbench.profiler.peak_flops import get_peak_flops

if TYPE_CHECKING:
    from peftbench.memory.devices import DeviceFacts
    from peftbench.memory.plan import Plan
    from peftbench.recipe.schema import Recipe

ConfigOverrides = dict[str, Any]


@dataclass(frozen=True)
class MemoryTarget:
    """What is to be fitted: so many bytes of a device."""

    facts: DeviceFacts
    device_name: str
    """As the user calls it."""
    budget_bytes: int | None
    """Of each process; None where it is only asked what is needed."""
    launch_config: LaunchConfig = SINGLE_PROCESS

    @property
    def required_budget(self) -> int:
        """The budget of a search, which has one.

        Raises:
            BudgetError: it has none.
        """
        if self.budget_bytes is None:
            raise BudgetError("what is it to fit? give --budget, as 16GiB, or --device")
        return self.budget_bytes

    def plan(self, recipe: Recipe) -> Plan:
        """What ``recipe`` would hold there; raises as :func:`peftbench.memory.estimate.estimate`."""
        if recipe.train.micro_batch_size == "auto":
            recipe, _ = choose_micro_batch(recipe, self)
        return estimate(recipe, self.facts, self.device_name, self.budget_bytes, self.launch_config)


@dataclass(frozen=True)
class Technique:
    """One way of saving memory: what it changes in a recipe, and what it costs."""

    name: str
    overrides: dict[str, ConfigOverrides]
    """Knobs by the recipe's part."""
    tradeoff: str | None
    """What is another computation with it, None where only time is."""

    def is_applicable(self, recipe: Recipe, facts: DeviceFacts) -> bool:
        """Whether it changes anything, has a sense for the recipe's method and optimizer, and the device has it."""
        if self.overrides.get("train", {}).get("precision") == "bf16" and (
            not facts.bf16 or facts.device_type == "cpu"
        ):
            return False
        if self.name == "checkpointing" and recipe.method.has_frozen_backbone:
            return False
        optimizer = self.overrides.get("optimizer")
        if optimizer is not None and optimizer["kind"] not in recipe.optimizer.low_memory_variants:
            return False
        return self.apply(recipe) != recipe

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with it."""
        made = recipe
        for part, change in self.overrides.items():
            value = getattr(made, part)
            if part == "optimizer":
                kept = value.model_dump(exclude={"kind"}) | {k: v for k, v in change.items() if k != "kind"}
                value = OPTIMIZERS[change["kind"]](**kept)
            else:
                value = value.model_copy(update=change)
            made = made.model_copy(update={part: value})
        return made


TECHNIQUES = (
    Technique("labelled_logits", {"train": {"logits": "labels_only"}}, None),
    Technique("checkpointing", {"train": {"gradient_checkpointing": True}}, None),
    Technique("fused_gelu", {"model": {"fused_gelu": True}}, "the last digit of GELU (2.4e-7)"),
    Technique("bf16", {"train": {"precision": "bf16"}}, "arithmetic in bf16"),
    Technique("adamw8bit", {"optimizer": {"kind": "adamw8bit"}}, "moments in 8 bits"),
    Technique(
        "bf16_weights",
        {"optimizer": {"kind": "adamw8bit_bf16"}, "train": {"precision": "bf16"}},
        "weights in bf16, rounded stochastically, and moments in 8 bits",
    ),
)
"""In the order in which a person would try them."""


def list_micro_batch_sizes(recipe: Recipe, num_processes: int = 1) -> list[int]:
    """Every size of micro-batch that one of ``processes`` can have, from one example to all of them at once.

    Two limits that cut a step into as many parts are one size.
    """
    limits = range(1, recipe.train.global_batch_size + 1)
    return sorted({compute_micro_batching(recipe.train.global_batch_size, limit, num_processes)[1] for limit in limits})


def find_largest_fitting(
    sizes: Sequence[int], has_capacity: Callable[[int], bool], fits: Callable[[int], bool]
) -> int | None:
    """The largest of ``sizes`` (the smallest first) that ``fits``, None where none does.

    What tensors take grows with the size, and so where they have no room (``holds``) is found by halving. What the
    allocator takes for them does not: fragments of one size may be more than those of a larger one. So from there on
    the sizes are tried one by one, downwards.
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
    """The plan of one run of a suite; where the weights alone have no room it says so, and where there is none, why."""
    try:
        there = build_target()
        try:
            return there.plan(recipe)
        except BudgetTooSmallError:
            plan = replace(there, budget_bytes=None).plan(recipe)
            budget, (low, high) = there.required_budget, plan.process_bytes
            said = {"budget_bytes": budget, "verdict": "does not fit", "margin_bytes": (budget - high, budget - low)}
            return plan.model_copy(update=said)
    except PeftbenchError as error:
        return UnplannedRun(name=recipe.name, reason=str(error))


def find_evaluation_batch_size(recipe: Recipe, target: MemoryTarget) -> int | None:
    """The recipe's batch of evaluation, halved until it fits beside a training that takes one example at a time."""
    batch = recipe.evaluate.batch_size
    while batch:
        if target.plan(with_evaluation_batch(with_micro_batch(recipe, 1), batch)).verdict == "fits":
            return batch
        batch //= 2
    return None


def best_plan(recipe: Recipe, target: MemoryTarget) -> Plan | None:
    """The plan of the largest micro-batch that fits, None where not even one example does.

    The global batch stays. Where evaluation would not fit, its batch is halved until it does.

    Raises:
        NoRoomError: there is none for the weights alone.
        NotEstimatedError: something in the recipe is not predicted.
    """
    batch = find_evaluation_batch_size(recipe, target)
    if batch is None:
        return None
    recipe = with_evaluation_batch(recipe, batch)
    plans: dict[int, Plan] = {}

    def plan(size: int) -> Plan:
        if size not in plans:
            plans[size] = target.plan(with_micro_batch(recipe, size))
        return plans[size]

    def holds(size: int) -> bool:
        made = plan(size)
        return made.peak.allocated_bytes + made.process_bytes[0] - made.reserved_bytes <= target.required_budget

    found = find_largest_fitting(
        list_micro_batch_sizes(recipe, target.launch_config.num_processes),
        holds,
        lambda size: plan(size).verdict == "fits",
    )
    return None if found is None else plans[found]


def choose_micro_batch(recipe: Recipe, target: MemoryTarget) -> tuple[Recipe, str]:
    """The recipe with a number for ``train.micro_batch_size=auto``, the most that fits ``room``, and a note of it.

    Where not even one example is predicted to fit it is one: the run will tell.

    Raises:
        BudgetError: it is not known what is to fit.
        NotEstimatedError: something in the recipe is not predicted.
    """
    size = f"{target.required_budget / 2**20:,.0f} MiB"
    try:
        plan = best_plan(recipe, target)
    except BudgetTooSmallError:
        plan = None
    if plan is None:
        return with_micro_batch(recipe, 1), "not even one example at once is predicted to fit; it was tried with one"
    note = f"train.micro_batch_size=auto became {plan.micro_batch_size}, the most that is predicted to fit {size}"
    if plan.evaluation_batch_size != recipe.evaluate.batch_size:
        note += f", with evaluate.batch_size={plan.evaluation_batch_size}"
    return with_evaluation_batch(with_micro_batch(recipe, plan.micro_batch_size), plan.evaluation_batch_size), note


def with_evaluation_batch(recipe: Recipe, size: int) -> Recipe:
    """The recipe with ``size`` examples at once in evaluation, on which no result depends."""
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"batch_size": size})})


def with_micro_batch(recipe: Recipe, size: int) -> Recipe:
    """The recipe with micro-batches of ``size`` examples."""
    rows = {"micro_batch_size": size, "micro_batch_tokens": None}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=rows)})


def list_technique_sets(recipe: Recipe, allowed: Sequence[str], facts: DeviceFacts) -> list[tuple[Technique, ...]]:
    """Every set of allowed techniques that makes sense for the recipe and the device, the smaller ones first.

    Raises:
        BudgetError: a technique that is not known.
    """
    known = {technique.name: technique for technique in TECHNIQUES}
    if unknown := [name for name in allowed if name not in known]:
        raise BudgetError(f"there is no technique {unknown[0]!r}", did_you_mean(unknown[0], known))
    usable = [known[name] for name in known if name in allowed and known[name].is_applicable(recipe, facts)]
    sets = itertools.chain.from_iterable(itertools.combinations(usable, number) for number in range(len(usable) + 1))
    return [chosen for chosen in sets if _are_disjoint(chosen)]


def _are_disjoint(techniques: tuple[Technique, ...]) -> bool:
    """Whether no two of them change the same knob."""
    knobs = [(part, key) for technique in techniques for part, change in technique.overrides.items() for key in change]
    return len(knobs) == len(set(knobs))


def with_techniques(recipe: Recipe, techniques: Iterable[Technique]) -> Recipe:
    """The recipe with all of them."""
    for technique in techniques:
        recipe = technique.apply(recipe)
    return recipe


def apply_strategy(recipe: Recipe, strategy: Strategy) -> Recipe:
    """The recipe as a strategy would run it."""
    known = {technique.name: technique for technique in TECHNIQUES}
    changed = with_techniques(recipe, [known[name] for name in strategy.techniques])
    return with_evaluation_batch(
        with_micro_batch(changed, strategy.plan.micro_batch_size), strategy.plan.evaluation_batch_size
    )


def strategies(recipe: Recipe, allowed_techniques: str, target: MemoryTarget) -> list[Strategy]:
    """What fits of every set of the techniques named in ``allow`` ("all", or names with commas), the fastest first.

    Raises:
        BudgetError: a technique that is not known, or a budget below the weights alone.
        NotEstimatedError: something in the recipe is not predicted.
    """
    names = (
        [technique.name for technique in TECHNIQUES]
        if allowed_techniques == "all"
        else [n for n in allowed_techniques.split(",") if n]
    )
    sets = list_technique_sets(recipe, names, target.facts)
    bar = tqdm(sets, desc="rehearsing", unit="way", disable=None, leave=False)
    found = []
    for chosen in bar:
        try:
            found.append(find_strategy(recipe, chosen, target))
        except (CombinationError, OptimizerError):  # a technique that this engine has not, or no library for
            if not chosen:  # it is the recipe itself
                raise
    return sort_fastest_first([one for one in found if one is not None])


def find_largest_model(
    recipe: Recipe, family_name: str, allowed_techniques: str, target: MemoryTarget
) -> tuple[ModelFit, ...]:
    """The recipe over the models of a family, from the largest to the first that fits.

    Raises:
        BudgetError: a family or a technique that is not known.
        NotEstimatedError, ModelError: the recipe is not predicted, or its method does not suit the family.
    """
    tried: list[ModelFit] = []
    for member in reversed(get_family(family_name).members):
        model = recipe.model.model_copy(update={"path": member.name, "revision": None})
        try:
            found = strategies(recipe.model_copy(update={"model": model}), allowed_techniques, target)
        except BudgetTooSmallError:
            found = []
        tried.append(ModelFit(name=member.name, parameters=member.parameters, strategy=found[0] if found else None))
        if found:
            break
    return tuple(tried)


def find_strategy(recipe: Recipe, techniques: tuple[Technique, ...], target: MemoryTarget) -> Strategy | None:
    """The largest micro-batch that fits ``room`` with these techniques, None where none does."""
    changed = with_techniques(recipe, techniques)
    plan = best_plan(changed, target)
    if plan is None:
        return None
    peak = get_peak_flops(target.facts.torch_name, changed.train.precision)
    seconds = plan.step_flops / peak if plan.step_flops and peak else None
    knobs = [
        (f"{part}.{key}", value)
        for technique in techniques
        for part, change in technique.overrides.items()
        for key, value in change.items()
    ]
    knobs.append(("train.micro_batch_size", plan.micro_batch_size))
    if plan.evaluation_batch_size != recipe.evaluate.batch_size:
        knobs.append(("evaluate.batch_size", plan.evaluation_batch_size))
    return Strategy(
        techniques=tuple(technique.name for technique in techniques),
        overrides=tuple(f"{knob}={str(value).lower() if isinstance(value, bool) else value}" for knob, value in knobs),
        tradeoffs=tuple(technique.tradeoff for technique in techniques if technique.tradeoff),
        plan=plan,
        step_seconds=seconds,
    )
