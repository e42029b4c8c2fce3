"""Plans of one recipe at different micro-batch sizes and row lengths, and a line through them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

from peftbench.memory.search import with_evaluation_batch, with_micro_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peftbench.memory.plan import Plan
    from peftbench.memory.search import MemoryTarget
    from peftbench.recipe.schema import Recipe

Size = tuple[int, int]
"""Rows of a micro-batch, and tokens of each row."""

MICRO_BATCHES_PER_STEP = 2
"""Micro-batches of a planned step: from the second one on, gradients exist during the forward pass."""
_MAX_GUESSES = 5
"""Sizes that are chosen by a line through earlier plans; the search bisects after that."""
_FIRST_GUESS = 7
"""Index of the size that is planned first if no line is known."""
_NEAREST = 4
"""Plans through which a line is drawn: the first two of the nearest ones whose bytes differ."""
_SLOPE_ERROR = 0.25
"""Relative error of the line's slope that a prediction without a plan must allow."""
_RESERVED_ERROR = 64 << 20
"""Bytes by which fragments of the allocator may change a prediction."""


def plan_at(recipe: Recipe, target: MemoryTarget, rows: int, length: int) -> Plan:
    """Return the plan of training and of the held-out loss, both with ``rows`` rows of ``length`` tokens.

    Raises:
        PeftbenchError: the recipe cannot run on this target, or its memory is not modeled.
    """
    sized = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"max_length": length}),
            "train": recipe.train.model_copy(
                update={"global_batch_size": rows * MICRO_BATCHES_PER_STEP * target.launch_config.dp_world_size}
            ),
        }
    )
    return target.plan(with_evaluation_batch(with_micro_batch(sized, rows), rows))


@dataclass
class PlanPoints:
    """Plans of one recipe by micro-batch size and row length; each is computed once."""

    recipe: Recipe
    target: MemoryTarget
    plans: dict[Size, Plan] = field(default_factory=dict)

    def get(self, rows: int, length: int) -> Plan:
        """Return the plan at this size; raises like :func:`plan_at`."""
        if (rows, length) not in self.plans:
            self.plans[rows, length] = plan_at(self.recipe, self.target, rows, length)
        return self.plans[rows, length]

    def fits(self, rows: int, length: int) -> bool:
        """True if the plan at this size surely fits."""
        return self.get(rows, length).verdict == "fits"

    def find_largest_size(self, sizes: Sequence[Size]) -> Size | None:
        """Return the largest of ``sizes``, in ascending order of memory, that surely fits; None if none fits.

        The size that is returned was planned, or a plan of more and longer rows fits. The next size was planned too,
        or the line through the plans exceeds the budget by far.

        Raises:
            PeftbenchError: as :func:`plan_at`.
        """
        low, high, num_guesses = -1, len(sizes), 0
        for index, size in enumerate(sizes):
            if any(_contains(known, size) and self.fits(*known) for known in self.plans):
                low = index
            elif any(_contains(size, known) and not self.fits(*known) for known in self.plans):
                high = min(high, index)
        while high - low > 1 and not (low >= 0 and self._exceeds_budget(sizes[low], sizes[low + 1])):
            guess = self._guess_index(sizes, low, high) if num_guesses < _MAX_GUESSES else (low + high) // 2
            num_guesses += 1
            if self.fits(*sizes[guess]):
                low = guess
            else:
                high = guess
        return sizes[low] if low >= 0 else None

    def _guess_index(self, sizes: Sequence[Size], low: int, high: int) -> int:
        """Return the index, between ``low`` and ``high``, of the largest size that the line predicts to fit."""
        line = self._find_line(sizes[low] if low >= 0 else sizes[0])
        if line is None:
            return min(low + _FIRST_GUESS, high - 1)
        origin, origin_bytes, slope = line
        tokens = origin + (self.target.required_budget - origin_bytes) / slope
        fitting = sum(size[0] * size[1] <= tokens for size in sizes)
        return max(low + 1, min(fitting - 1, high - 1))

    def _exceeds_budget(self, size: Size, larger: Size) -> bool:
        """True if ``larger`` exceeds the budget by the line's slope from ``size``, whatever the slope's error."""
        line = self._find_line(size)
        if line is None:
            return False
        added = line[2] * (1 - _SLOPE_ERROR) * (larger[0] * larger[1] - size[0] * size[1])
        planned = min(
            (plan.process_bytes[1] for known, plan in self.plans.items() if _contains(known, size)), default=0
        )
        return planned + added - _RESERVED_ERROR > self.target.required_budget

    def _find_line(self, size: Size) -> tuple[int, int, float] | None:
        """Return tokens and bytes of the plan that is nearest to ``size`` in tokens, and the bytes per token there.

        None unless two of the nearest plans differ in tokens and bytes.
        """
        tokens = size[0] * size[1]
        nearest = sorted(self.plans, key=lambda known: abs(known[0] * known[1] - tokens))[:_NEAREST]
        points = [(rows * length, self.plans[rows, length].process_bytes[1]) for rows, length in nearest]
        for (tokens_a, bytes_a), (tokens_b, bytes_b) in combinations(points, 2):
            if tokens_a != tokens_b and (bytes_b - bytes_a) * (tokens_b - tokens_a) > 0:
                return tokens_a, bytes_a, (bytes_b - bytes_a) / (tokens_b - tokens_a)
        return None


def _contains(size: Size, smaller: Size) -> bool:
    """True if a micro-batch of ``size`` needs at least the memory of one of ``smaller``.

    It has as many tokens in rows as long, or longer, and memory grows with both. A single row has no padding, and may
    need less than several rows with as many tokens.
    """
    has_padding = size[0] > 1 or smaller[0] == 1
    return has_padding and size[0] * size[1] >= smaller[0] * smaller[1] and size[1] >= smaller[1]
