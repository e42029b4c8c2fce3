"""Find the longest rows with which a recipe fits a budget, without a change of its micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftbench.memory.families import with_bundled_config
from peftbench.memory.label_counts import count_labeled_tokens, with_label_count
from peftbench.memory.model_fit.plan_points import PlanPoints
from peftbench.memory.plan import RowLimit
from peftbench.memory.search import with_evaluation_batch, with_micro_batch
from peftbench.modeling.loading import get_max_positions, load_config

if TYPE_CHECKING:
    from peftbench.memory.plan import Plan
    from peftbench.memory.search import MemoryTarget
    from peftbench.recipe.schema import Recipe

_LENGTH_STEP = 64
"""Lengths that are tried are multiples of this, and the model's limit."""
_MAX_LENGTH = 1 << 17
"""The longest row that is tried for a model whose config has no number of positions."""
_MAX_PLANS = 5
"""Plans in addition to the recipe's own."""


class _TooManyPlansError(Exception):
    """All plans of the search were made."""


@dataclass
class _RecipePoints(PlanPoints):
    """Plans of a recipe in which only ``data.max_length`` changes."""

    def get(self, rows: int, length: int) -> Plan:
        """Return the plan with rows of this length.

        Raises:
            _TooManyPlansError: it is not known, and no more plans are made.
        """
        if (rows, length) not in self.plans:
            if len(self.plans) > _MAX_PLANS:
                raise _TooManyPlansError
            self.plans[rows, length] = self.target.plan(_with_max_length(self.recipe, length))
        return self.plans[rows, length]


def find_longest_rows(recipe: Recipe, target: MemoryTarget, plan: Plan) -> RowLimit | None:
    """Return the largest ``data.max_length`` that surely fits ``target`` at the micro-batch of ``plan``.

    ``plan`` is the recipe's own. The result was planned, or it is less than a length that was planned and fits. None if
    no length that was tried fits.

    Raises:
        PeftbenchError: as for the plan of the recipe.
    """
    recipe, _ = target.resolve(recipe)
    rows = plan.micro_batch_size
    recipe = with_evaluation_batch(with_micro_batch(recipe, rows), plan.evaluation_batch_size)
    most = _find_model_limit(recipe)
    longest = _MAX_LENGTH if most is None else most
    least = recipe.evaluate.max_new_tokens if recipe.task.evaluation == "generate" else 0
    lengths = {length for length in range(_LENGTH_STEP, longest, _LENGTH_STEP) if length > least}
    sizes = [(rows, length) for length in sorted(lengths | {plan.sequence_length, longest})]
    points = _RecipePoints(recipe, target, {(rows, plan.sequence_length): plan})
    with with_label_count(count_labeled_tokens(_with_max_length(recipe, longest), longest)):
        try:
            found = points.find_largest_size(sizes)
        except _TooManyPlansError:
            found = max((size for size, one in points.plans.items() if one.verdict == "fits"), default=None)
    return None if found is None else RowLimit(tokens=found[1], is_model_limit=found[1] == most)


def _find_model_limit(recipe: Recipe) -> int | None:
    """Return the most real tokens of a row that the model has positions for; None if its config has no number."""
    with with_bundled_config(recipe.model) as model_config:
        positions = get_max_positions(load_config(model_config))
    return None if positions is None else positions - recipe.method.occupied_positions


def _with_max_length(recipe: Recipe, length: int) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": length})})
