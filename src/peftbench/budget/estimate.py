"""From a recipe to a plan, without a GPU and without weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from peftbench.budget.allocator import OutOfMemoryError
from peftbench.budget.families import with_config_at_hand
from peftbench.budget.forecast import Forecast, Moment, forecast
from peftbench.budget.plan import Part, Plan, Verdict
from peftbench.budget.rehearsal import Rehearsal
from peftbench.budget.world import ALONE, World
from peftbench.data.batches import division
from peftbench.data.collate import Collator
from peftbench.data.encode import Layout
from peftbench.engine.bind import combination
from peftbench.engine.compatibility import check
from peftbench.errors import NoRoomError, NotEstimatedError, PrecisionError
from peftbench.models import load_config, positions
from peftbench.optim.eightbit import AdamW8bit

if TYPE_CHECKING:
    from peftbench.budget.devices import DeviceFacts
    from peftbench.budget.steering import DeviceKind
    from peftbench.engine.engines import EngineKind
    from peftbench.profiler.breakdown import Event
    from peftbench.recipe import Recipe


LEAST_LABELS = 64
"""Labelled tokens of a row, where summaries are generated shorter: those to learn from may be longer."""


def estimate(recipe: Recipe, facts: DeviceFacts, device: str, budget: int | None = None, world: World = ALONE) -> Plan:
    """What ``recipe`` would hold on one GPU with these ``facts``, and whether that fits ``budget`` bytes.

    With several processes, each on a GPU of its own, it is what the first of them holds.

    Raises:
        NotEstimatedError: something in it is not predicted, and is named.
        NoRoomError: the budget is less than the weights alone.
        PeftbenchError: the recipe itself cannot be run.
    """
    _check(recipe, world.engine, facts.kind)
    if recipe.train.precision == "bf16" and not facts.bf16:
        raise PrecisionError(f"train.precision=bf16 is not there on {facts.torch_name}; use fp16 or fp32")
    accumulation, rows = division(recipe.train.global_batch_size, _rows(recipe), world.processes)
    rehearsal = Rehearsal(_unpaged(recipe), facts.kind, accumulation, padded=rows > 1, world=world)
    width = _width(recipe, rehearsal.positions)
    labels = min(max(recipe.evaluate.max_new_tokens, LEAST_LABELS), width - 1)
    flops = rehearsal.step_flops(max(1, recipe.train.global_batch_size // world.processes), width, labels)
    with rehearsal:
        rehearsal.train(rows, width, labels)
        rehearsal.evaluate(recipe.evaluate.batch_size, width, labels)
        if recipe.evaluate.generate:
            new = recipe.evaluate.max_new_tokens
            rehearsal.generate(recipe.evaluate.batch_size * recipe.evaluate.num_beams, width - new, new)
    events = list(rehearsal.book.events())
    found = forecast(events, facts.kind)
    context, workspaces = _plain(facts.context), _plain(facts.workspaces)
    overhead = (context[0] + workspaces[0], context[1] + workspaces[1])
    away = _pages(recipe, found)
    process = (found.reserved_bytes - away + overhead[0], found.reserved_bytes + overhead[1])
    verdict, margin = None, None
    if budget is not None:
        weights = found.peak.live_by_kind["weights"]
        if budget < weights:
            raise NoRoomError(f"{budget:,} bytes do not hold the {weights:,} of the weights alone; give more")
        verdict = _verdict(events, process, budget - overhead[0] + away, budget, facts.kind)
        margin = (budget - process[1], budget - process[0])
    parts = {name: _part(moment) for name, moment in found.by_part.items()}
    return Plan(
        name=recipe.name, engine=world.engine.name, processes=world.processes, device=device,
        calibrated=facts.calibrated, rows=rows, width=width, micro_batches=accumulation,
        evaluation_rows=recipe.evaluate.batch_size, step_flops=flops, parts=parts,
        peak_part=found.peak.part, reserved_bytes=found.reserved_bytes, process_bytes=process,
        context_bytes=context, workspaces_bytes=workspaces,
        budget_bytes=budget, verdict=verdict, margin_bytes=margin, notes=_notes(recipe, facts, width, labels, away),
    )  # fmt: skip


def _unpaged(recipe: Recipe) -> Recipe:
    """The recipe with states that the driver does not move, and that are as large."""
    if recipe.optimizer.kind != "paged_adamw8bit":
        return recipe
    return recipe.model_copy(update={"optimizer": AdamW8bit(**recipe.optimizer.model_dump(exclude={"kind"}))})


def _pages(recipe: Recipe, found: Forecast) -> int:
    """Bytes that the driver can move to the CPU's memory."""
    if recipe.optimizer.kind != "paged_adamw8bit":
        return 0
    return max(moment.live_by_kind["optimizer_state"] for moment in found.by_part.values())


def _plain(sizes: tuple[int, int]) -> tuple[int, int]:
    """Numbers, which JSON has, of pydantic's sizes."""
    return int(sizes[0]), int(sizes[1])


def _check(recipe: Recipe, engine: EngineKind, kind: DeviceKind) -> None:
    if not recipe.method.trains:
        raise NotEstimatedError(f"{recipe.method.kind} trains nothing; estimate a recipe of a method that does")
    check(combination(recipe, engine), kind)
    if engine.on_disk:
        raise NotEstimatedError(f"what {engine.name} keeps on a disk, and brings, is not predicted; use zero3_offload")
    if kind == "cpu" and recipe.train.precision != "fp32":
        raise NotEstimatedError(
            "in bf16 the CPU's kernels convert what they are given in memory of their own, which is not predicted; use "
            "train.precision=fp32, or --device with a GPU"
        )
    if recipe.model.quantization == "int8":
        raise NotEstimatedError("outliers of an int8 base depend on its values; use model.quantization=nf4 or null")
    if recipe.optimizer.kind == "deepspeed_cpu_adam":
        raise NotEstimatedError("deepspeed_cpu_adam would be compiled and steps for real; use optimizer.kind=adamw")
    if recipe.model.attention == "flash_attention_2":
        raise NotEstimatedError("flash_attention_2 is not predicted; use model.attention=sdpa, which is near to it")


def _rows(recipe: Recipe) -> int | None:
    """Most rows of a micro-batch; where it is given in tokens, as many of the longest as are not less than those."""
    if recipe.train.micro_batch_tokens is None:
        return recipe.train.rows
    with with_config_at_hand(recipe.model) as at_hand:
        width = _width(recipe, positions(load_config(at_hand))) + recipe.method.virtual_tokens
    return math.ceil(recipe.train.micro_batch_tokens / width)


def _width(recipe: Recipe, positions: int | None) -> int:
    """Of the longest row, padded to its multiple."""
    virtual = recipe.method.virtual_tokens
    longest = Layout.fit(
        separator=recipe.data.separator, max_tokens=recipe.data.max_length, new_tokens=recipe.evaluate.max_new_tokens,
        positions=positions, virtual_tokens=virtual,
    ).max_tokens  # fmt: skip
    return Collator(0, virtual, multiple=recipe.data.pad_to_multiple_of, most=positions).width(longest)


def _verdict(events: list[Event], process: tuple[int, int], tensors: int, budget: int, kind: DeviceKind) -> Verdict:
    """Fits by the most that it may take; does not fit if even the least beside ``tensors`` leaves those too little."""
    if process[1] <= budget:
        return "fits"
    try:
        forecast(events, kind, capacity=tensors)
    except OutOfMemoryError:
        return "does not fit"
    return "too close to say"


def _part(moment: Moment) -> Part:
    return Part(
        live_bytes=moment.live_bytes, allocated_bytes=moment.allocated_bytes,
        live_by_kind={kind: value for kind, value in moment.live_by_kind.items() if value}, operation=moment.operation,
    )  # fmt: skip


def _notes(recipe: Recipe, facts: DeviceFacts, width: int, labels: int, away: int) -> tuple[str, ...]:
    notes = [
        f"for rows of {width} tokens, as many as data.max_length or the model allows, with {labels} of them labelled, "
        f"as many as evaluate.max_new_tokens makes, and no fewer than {LEAST_LABELS}"
    ]
    if away:
        notes.append(f"the driver moves {away:,} bytes of states to the CPU's memory where there is no room")
    if recipe.train.feature_cache is not None:
        notes.append("for steps that compute the trunk; those that read its states from the trunk cache take less")
    if not facts.calibrated:
        notes.append("what only the device knows (context, workspaces) was not measured on one: uncalibrated")
    return tuple(notes)
