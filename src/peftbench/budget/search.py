"""What fits: the largest micro-batch, and ways of saving memory, the fastest first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftbench.budget.estimate import estimate
from peftbench.errors import BudgetError

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

    def applies(self, recipe: Recipe) -> bool:
        """Whether it changes anything and has a sense for the recipe's method and optimizer."""
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
                from peftbench.optim import OPTIMIZERS

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


@dataclass(frozen=True)
class Strategy:
    """Techniques and a micro-batch that fit together."""

    techniques: tuple[Technique, ...]
    micro_batch: int
    plan: Plan
    relative_time: float | None
    """Predicted, by FLOPs, of the fastest strategy's."""

    @property
    def name(self) -> str:
        """For a table."""
        return " + ".join(technique.name for technique in self.techniques) or "as it is"


def largest_micro_batch(recipe: Recipe, fits: Callable[[Recipe], bool]) -> Recipe | None:
    """The recipe with the largest micro-batch that ``fits``, None where not even one example does.

    The global batch stays; memory grows with the micro-batch, so it is found by halving.
    """
    least, most = 0, recipe.train.global_batch
    while least < most:
        middle = (least + most + 1) // 2
        if fits(with_micro_batch(recipe, middle)):
            least = middle
        else:
            most = middle - 1
    return with_micro_batch(recipe, least) if least else None


def with_micro_batch(recipe: Recipe, size: int) -> Recipe:
    """The recipe with micro-batches of ``size`` examples."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": size})})


def strategies(
    recipe: Recipe, facts: DeviceFacts, device: str, budget: int, allowed: Sequence[str]
) -> Iterator[Strategy]:
    """Every set of allowed techniques with the largest micro-batch that fits ``budget`` bytes with it.

    Raises:
        BudgetError: a technique that is not known.
    """
    known = {technique.name: technique for technique in TECHNIQUES}
    if unknown := [name for name in allowed if name not in known]:
        raise BudgetError(f"there is no technique {unknown[0]!r} to save memory with; known: {', '.join(known)}")
    usable = [known[name] for name in known if name in allowed and known[name].applies(recipe)]
    for number in range(len(usable) + 1):
        for chosen in itertools.combinations(usable, number):
            if sum("optimizer" in technique.changes for technique in chosen) > 1:
                continue
            changed = recipe
            for technique in chosen:
                changed = technique.on(changed)
            plans: dict[int | None, Plan] = {}

            def fits(asked: Recipe, plans: dict[int | None, Plan] = plans) -> bool:
                plan = plans[asked.train.micro_batch] = estimate(asked, facts, device, budget)
                return plan.verdict == "fits"

            found = largest_micro_batch(changed, fits)
            if found is not None and found.train.micro_batch is not None:
                size = found.train.micro_batch
                yield Strategy(chosen, size, plans[size], None)
