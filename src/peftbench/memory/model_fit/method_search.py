"""Plan every method of a model on one device, and collect the answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftbench.errors import OutOfRangeError, PeftbenchError
from peftbench.memory.label_counts import LabelCount, with_label_count
from peftbench.memory.model_fit.answer import FitAnswer, MethodFit, MicroBatchLimit
from peftbench.memory.model_fit.host_memory import compute_host_bytes
from peftbench.memory.model_fit.methods import FIT_METHODS, FitMethod, FitRequest, select_error
from peftbench.memory.model_fit.plan_points import PlanPoints
from peftbench.memory.model_fit.speed import Workload, describe_speed

if TYPE_CHECKING:
    from peftbench.memory.model_fit.examples import ExampleLengths
    from peftbench.memory.plan import Plan
    from peftbench.memory.search import MemoryTarget
    from peftbench.recipe.schema import Recipe

BuildTarget = Callable[[FitMethod, "Recipe"], "MemoryTarget"]
COLUMN_LENGTHS = (1024, 2048, 4096, 8192)
"""Row lengths for which the largest micro-batch is searched."""
DEFAULT_LENGTH = 1024
"""Tokens of a row for the verdict, unless --max-length or the data set another."""
MICRO_BATCH_SIZES = (*range(1, 17), *range(20, 65, 4))
"""Sizes that are tried, in ascending order."""
EVERY_TOKEN = LabelCount(sys.maxsize, "every token, since the data were not read")
_CONTEXT_STEP, _LONG_CONTEXT, _LONG_CONTEXT_STEP = 256, 16384, 1024
"""Context lengths are multiples of 256 up to 16k tokens, and of 1,024 above."""
_FIXED_CATEGORIES = ("weights", "gradients", "optimizer_state")
_MAX_CONTEXT = 1 << 20
"""Longest context that is tried for a model whose config has no limit."""


@dataclass(frozen=True)
class FitSettings:
    """Settings that the rows of the answer share."""

    request: FitRequest
    device_name: str
    budget_bytes: int
    max_positions: int | None
    parameters: int
    num_examples: int
    """Examples whose time is given, if no file has them."""
    max_length: int | None = None
    price_per_hour: float | None = None
    examples: ExampleLengths | None = None
    data_note: str | None = None

    @property
    def reference_length(self) -> int:
        """Tokens of a row for the verdict: the longest example or the option, at most the model's positions."""
        longest = self.max_length or DEFAULT_LENGTH if self.examples is None else self.examples.longest
        return min(longest, self.max_positions or longest)

    @property
    def column_lengths(self) -> tuple[int, ...]:
        """Row lengths for which the largest micro-batch is searched: those that the model has positions for."""
        lengths = [length for length in COLUMN_LENGTHS if length <= (self.max_positions or length)]
        return tuple(sorted({*lengths, self.reference_length}))

    @property
    def workload(self) -> Workload:
        """The examples whose time is given."""
        if self.examples is None:
            return Workload(self.num_examples, self.reference_length, self.price_per_hour)
        return Workload(self.examples.num_examples, self.examples.mean, self.price_per_hour)

    def label_context(self) -> AbstractContextManager[None]:
        """Return a context in which plans have the labeled tokens of the examples, or label all tokens."""
        return with_label_count(EVERY_TOKEN if self.examples is None else self.examples.labels)


def fit_model(
    settings: FitSettings, build_target: BuildTarget, report_progress: Callable[[str], None] = lambda _: None
) -> FitAnswer:
    """Return which methods fit, in the order of ``FIT_METHODS``.

    Raises:
        PeftbenchError: no method has a plan; the error is that of the first one.
    """
    rows: list[MethodFit] = []
    errors: list[PeftbenchError] = []
    for method in FIT_METHODS:
        report_progress(method.title)
        try:
            with settings.label_context():
                recipe = settings.request.build_recipe(method)
                rows.append(fit_method(method, recipe, build_target(method, recipe), settings))
        except PeftbenchError as error:
            errors.append(error)
            rows.append(MethodFit(name=method.name, title=method.title, overrides=method.overrides, reason=str(error)))
    if len(errors) == len(rows):
        raise select_error(errors)
    return FitAnswer(
        model=settings.request.model_path,
        parameters=settings.parameters,
        device_name=settings.device_name,
        budget_bytes=settings.budget_bytes,
        reference_length=settings.reference_length,
        max_positions=settings.max_positions,
        column_lengths=settings.column_lengths,
        num_examples=settings.workload.num_examples,
        tokens_per_example=settings.workload.tokens_per_example,
        methods=_suggest_other_methods(rows),
        notes=_list_notes(settings, rows),
        exit_code=0 if any(row.fits for row in rows) else 1,
    )


def fit_method(method: FitMethod, recipe: Recipe, target: MemoryTarget, settings: FitSettings) -> MethodFit:
    """Return the verdict of one method, its largest micro-batches and its longest context.

    Raises:
        PeftbenchError: the recipe cannot run on this target, or its memory is not modeled.
    """
    recipe, _ = target.resolve(recipe)
    points = PlanPoints(recipe, target)
    room = None if settings.max_positions is None else settings.max_positions - recipe.method.occupied_positions
    if room is not None and room < 1:
        raise OutOfRangeError(
            f"the method takes {recipe.method.occupied_positions} of the model's {settings.max_positions} positions "
            "and leaves none for tokens; use fewer virtual tokens"
        )
    plan = points.get(1, min(settings.reference_length, room or settings.reference_length))
    limits = tuple(_find_micro_batch(points, min(length, room or length)) for length in settings.column_lengths)
    longest = _find_longest_context(points, plan, room)
    precision = recipe.train.resolved_precision
    return MethodFit(
        name=method.name,
        title=method.title,
        overrides=method.overrides,
        engine=plan.engine,
        precision=precision,
        verdict=plan.verdict,
        plan=plan,
        micro_batches=limits,
        longest_context=longest,
        host_bytes=compute_host_bytes(recipe, target.launch_config, settings.parameters),
        speed=describe_speed(plan, settings.workload),
        change=None if plan.verdict == "fits" else _find_change(points, plan, longest),
        num_plans=len(points.plans),
    )


def _find_micro_batch(points: PlanPoints, length: int) -> MicroBatchLimit:
    """Return the largest micro-batch of rows of ``length`` tokens that surely fits."""
    largest = points.find_largest_size([(rows, length) for rows in MICRO_BATCH_SIZES])
    rows = 0 if largest is None else largest[0]
    return MicroBatchLimit(length=length, rows=rows, is_largest_tried=rows == MICRO_BATCH_SIZES[-1])


def _find_longest_context(points: PlanPoints, plan: Plan, room: int | None) -> int | None:
    """Return the tokens of the longest single row that surely fits, None if none fits."""
    if _compute_fixed_bytes(plan) > points.target.required_budget:
        return None
    largest = points.find_largest_size([(1, length) for length in _list_context_lengths(room or _MAX_CONTEXT)])
    return None if largest is None else largest[1]


def _list_context_lengths(longest: int) -> list[int]:
    """Return the context lengths that are tried, in ascending order; ``longest`` is the last one."""
    fine = range(_CONTEXT_STEP, min(longest, _LONG_CONTEXT) + 1, _CONTEXT_STEP)
    coarse = range(_LONG_CONTEXT + _LONG_CONTEXT_STEP, longest + 1, _LONG_CONTEXT_STEP)
    return sorted({*fine, *coarse, longest})


def _compute_fixed_bytes(plan: Plan) -> int:
    """Return the bytes that a row of any length takes: weights, gradients, optimizer states and the process's own."""
    step = plan.phase_peaks.get("optimizer")
    fixed = 0 if step is None else sum(step.live_bytes_by_category.get(name, 0) for name in _FIXED_CATEGORIES)
    return fixed + plan.process_bytes[0] - plan.reserved_bytes


def _find_change(points: PlanPoints, plan: Plan, longest_context: int | None) -> str | None:
    """Return the cheapest change with which the method surely fits, None if there is none."""
    recipe = points.recipe
    if not recipe.train.gradient_checkpointing and not recipe.method.has_frozen_backbone:
        changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"gradient_checkpointing": True})})
        if PlanPoints(changed, points.target).fits(1, plan.sequence_length):
            return "train.gradient_checkpointing=true"
    return None if longest_context is None else f"data.max_length={longest_context}"


def _suggest_other_methods(rows: Sequence[MethodFit]) -> tuple[MethodFit, ...]:
    """Return the rows; those that do not fit and have no change name the first method that fits."""
    fitting = next((row for row in rows if row.fits), None)
    other = "no method fits" if fitting is None else f"use {fitting.title}"
    return tuple(
        row.model_copy(update={"change": f"none for this method; {other}"})
        if row.plan is not None and not row.fits and row.change is None
        else row
        for row in rows
    )


def _list_notes(settings: FitSettings, rows: Sequence[MethodFit]) -> tuple[str, ...]:
    """Return what the answer assumes."""
    notes = [
        "planned: training and held-out loss with the same micro-batch, and at least two micro-batches per step; text "
        "generation is not planned",
        "gradient checkpointing is on, except for the last layer, which has no use for it; plan without it: "
        "train.gradient_checkpointing=false",
        f"micro-batches above 16 are multiples of 4; {MICRO_BATCH_SIZES[-1]} is the largest tried",
    ]
    if settings.data_note is not None:
        notes.insert(0, settings.data_note)
    if any(row.plan is not None and not row.plan.calibrated for row in rows):
        notes.append("uncalibrated: CUDA context and workspaces were not measured on this device, hence the range")
    return tuple(notes)
