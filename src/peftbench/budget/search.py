"""What fits: the largest micro-batch, and ways of saving memory, the fastest first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftbench.budget.estimate import estimate
from peftbench.budget.plan import Strategy
from peftbench.budget.world import ALONE, World
from peftbench.errors import BudgetError, nearest
from peftbench.optim import OPTIMIZERS
from peftbench.profiler.devices import peak_flops

if TYPE_CHECKING:
    from peftbench.budget.devices import DeviceFacts
    from peftbench.budget.plan import Plan
    from peftbench.recipe import Recipe

Change = dict[str, Any]


@dataclass(frozen=True)
class Technique:
    """One way of saving memory: what it changes in a recipe, and what it costs."""

    name: str
    changes: dict[str, Change]
    """Knobs by the recipe's part."""
    trades: str | None
    """What is another computation with it, None where only time is."""

    def applies(self, recipe: Recipe, facts: DeviceFacts) -> bool:
        """Whether it changes anything, has a sense for the recipe's method and optimizer, and the device has it."""
        if self.changes.get("train", {}).get("precision") == "bf16" and not facts.bf16:
            return False
        if self.name == "checkpointing" and recipe.method.trunk_frozen:
            return False
        if "optimizer" in self.changes and recipe.optimizer.kind != "adamw":
            return False
        return self.on(recipe) != recipe

    def on(self, recipe: Recipe) -> Recipe:
        """The recipe with it."""
        made = recipe
        for part, change in self.changes.items():
            value = getattr(made, part)
            if part == "optimizer":
                kept = value.model_dump(exclude={"kind"}) | {k: v for k, v in change.items() if k != "kind"}
                value = OPTIMIZERS[change["kind"]](**kept)
            else:
                value = value.model_copy(update=change)
            made = made.model_copy(update={part: value})
        return made


TECHNIQUES = (
    Technique("checkpointing", {"train": {"gradient_checkpointing": True}}, None),
    Technique("fused_gelu", {"model": {"fused_gelu": True}}, "the last digit of GELU (2.4e-7)"),
    Technique("bf16", {"train": {"precision": "bf16"}}, "arithmetic in bf16"),
    Technique("adamw8bit", {"optimizer": {"kind": "adamw8bit"}}, "moments in 8 bits"),
    Technique(
        "bf16_weights", {"optimizer": {"kind": "adamw8bit_bf16"}, "train": {"precision": "bf16"}},
        "weights in bf16, rounded stochastically, and moments in 8 bits",
    ),
)  # fmt: skip
"""In the order in which a person would try them."""


def largest_micro_batch(recipe: Recipe, fits: Callable[[Recipe], bool]) -> Recipe | None:
    """The recipe with the largest micro-batch that ``fits``, None where not even one example does.

    The global batch stays. Memory grows with the micro-batch, so it is found by halving.
    """
    least, most = 0, recipe.train.global_batch
    middle = most  # often all fit
    while least < most:
        if fits(with_micro_batch(recipe, middle)):
            least = middle
        else:
            most = middle - 1
        middle = (least + most + 1) // 2
    return with_micro_batch(recipe, least) if least else None


def with_micro_batch(recipe: Recipe, size: int) -> Recipe:
    """The recipe with micro-batches of ``size`` examples."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": size})})


def chosen_techniques(recipe: Recipe, allowed: Sequence[str], facts: DeviceFacts) -> list[tuple[Technique, ...]]:
    """Every set of allowed techniques that makes sense for the recipe and the device, the smaller ones first.

    Raises:
        BudgetError: a technique that is not known.
    """
    known = {technique.name: technique for technique in TECHNIQUES}
    if unknown := [name for name in allowed if name not in known]:
        raise BudgetError(f"there is no technique {unknown[0]!r}", nearest(unknown[0], known))
    usable = [known[name] for name in known if name in allowed and known[name].applies(recipe, facts)]
    sets = itertools.chain.from_iterable(itertools.combinations(usable, number) for number in range(len(usable) + 1))
    return [chosen for chosen in sets if _apart(chosen)]


def _apart(techniques: tuple[Technique, ...]) -> bool:
    """Whether no two of them change the same knob."""
    knobs = [(part, key) for technique in techniques for part, change in technique.changes.items() for key in change]
    return len(knobs) == len(set(knobs))


def strategy(
    recipe: Recipe, techniques: tuple[Technique, ...], facts: DeviceFacts, device: str, budget: int, *,
    world: World = ALONE,
) -> Strategy | None:  # fmt: skip
    """The largest micro-batch that fits ``budget`` bytes with these techniques, None where none does."""
    changed = recipe
    for technique in techniques:
        changed = technique.on(changed)
    plans: dict[int | None, Plan] = {}

    def fits(asked: Recipe) -> bool:
        plan = plans[asked.train.micro_batch] = estimate(asked, facts, device, budget, world)
        return plan.verdict == "fits"

    found = largest_micro_batch(changed, fits)
    if found is None:
        return None
    plan = plans[found.train.micro_batch]
    peak = peak_flops(facts.torch_name, found.train.precision)
    seconds = plan.step_flops / peak if plan.step_flops and peak else None
    knobs = [(f"{part}.{key}", value) for technique in techniques
             for part, change in technique.changes.items() for key, value in change.items()]  # fmt: skip
    knobs.append(("train.micro_batch", plan.rows))
    return Strategy(
        techniques=tuple(technique.name for technique in techniques),
        changes=tuple(f"{knob}={str(value).lower() if isinstance(value, bool) else value}" for knob, value in knobs),
        trades=tuple(technique.trades for technique in techniques if technique.trades), plan=plan, seconds=seconds,
    )  # fmt: skip
