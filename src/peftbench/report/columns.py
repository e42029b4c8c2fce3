"""The columns of the comparison: what each shows, in plain text and as a raw value, and what it means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from peftbench.record import Interval, RunRecord, TokensPerSecond, train_peak_bytes
from peftbench.report.lines import kind_of

UNKNOWN = "unknown"
Raw = str | int | float | None
_Value = TypeVar("_Value", bound=Raw)


def finite(value: _Value) -> _Value | None:
    """None for a float that is no number, of which JSON knows nothing; anything else as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Column:
    """One column. ``raw`` gives a record's values by CSV name (units in names); ``text`` shows the first."""

    title: str
    meaning: str
    raw: Callable[[RunRecord], dict[str, Raw]]
    text: Callable[[RunRecord], str]
    optional: bool = False
    """Shown only where some record has a value to show, "unknown" included."""


def method_label(record: RunRecord) -> str:
    """The run's name, and its method where the name does not say it."""
    return labelled(record.name, kind_of(record))


def labelled(name: str, kind: str) -> str:
    """A name, and its method where it does not say it."""
    return name if kind in name else f"{name} ({kind})"


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _trained(record: RunRecord) -> int | None:
    return record.parameters.trainable if record.parameters else None


def _share(record: RunRecord) -> float | None:
    return record.parameters.trainable / record.parameters.total if record.parameters else None


def _seconds(record: RunRecord) -> str:
    seconds = record.train_seconds
    return "–" if seconds is None else f"{seconds:.1f}"


def _speed(record: RunRecord, kind: str) -> float | None:
    return getattr(record.throughput.tokens_per_second, kind) if record.throughput else None


def _measured(record: RunRecord, text: str | None) -> str:
    """A figure of the timed steps: unknown where there are such steps and nothing tells it."""
    return text or (UNKNOWN if record.throughput else "–")


def _loss(record: RunRecord) -> float | None:
    return record.quality.loss if record.quality else None


def _rouge(kind: str, title: str, *, forced: bool = False) -> Column:
    name = f"teacher_forced_argmax_{kind}" if forced else kind

    def found(record: RunRecord) -> Interval | None:
        if record.quality is None:
            return None
        scores = record.quality.teacher_forced_argmax_rouge if forced else record.quality.rouge
        return (scores or {}).get(kind)

    def raw(record: RunRecord) -> dict[str, Raw]:
        score = found(record)
        values = (score.mean, score.low, score.high) if score else (None, None, None)
        return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))

    def text(record: RunRecord) -> str:
        score = found(record)
        return f"{score.mean:.1f} ({score.low:.1f}–{score.high:.1f})" if score else "–"

    meaning = (
        "with the reference shown token by token; the published study's figure" if forced else "of generated summaries"
    )
    return Column(
        title,
        f"{kind} F-measure {meaning}, percent, 95 % bootstrap interval over examples",
        raw,
        text,
        optional=True,
    )


def _allocator(record: RunRecord) -> dict[str, Raw]:
    """What a GPU's allocator made of the training, unknown on CPU."""
    memory = record.memory.get("train")
    return {
        "train_reserved_bytes": memory.reserved_bytes if memory else None,
        "train_fragmentation": memory.fragmentation if memory else None,
        "train_allocation_retries": memory.allocation_retries if memory else None,
    }


def outcome_text(record: RunRecord) -> str:
    """How a run ended, and at which step where not well."""
    outcome = record.outcome
    return outcome.kind + (f" at step {outcome.step}" if outcome.step is not None else "")


FIRST_TO_GO = (
    "ROUGE-Lsum",
    "ROUGE-2",
    "ROUGE-1",
    "share",
    "price",
    "required TFLOP",
    "of achievable",
    "J/1,000 samples",
    "MFU",
    "trained",
    "tokens/s",
)
"""Columns that a narrow terminal goes without, in this order; they are in the report."""

COLUMNS: tuple[Column, ...] = (
    Column(
        "run", "name of the run, and its method",
        lambda r: {"run": r.name, "method": kind_of(r)},
        method_label,
    ),
    Column(
        "trained", "scalars that training changes",
        lambda r: {"trained_parameters": _trained(r)},
        lambda r: "–" if _trained(r) is None else _count(_trained(r)),
    ),
    Column(
        "share", "trained parameters, of the base's",
        lambda r: {"trained_share": _share(r)},
        lambda r: "–" if (share := _share(r)) is None else f"{share:.2%}",
    ),
    Column(
        "held-out loss", "mean cross-entropy on summary and end tokens of held-out examples, nats; lower is better",
        lambda r: {"held_out_loss": _loss(r)},
        lambda r: "–" if (loss := _loss(r)) is None else f"{loss:.3f}",
    ),
    _rouge("rouge1", "ROUGE-1"),
    _rouge("rouge2", "ROUGE-2"),
    _rouge("rougeL", "ROUGE-L"),
    _rouge("rougeLsum", "ROUGE-Lsum"),
    _rouge("rougeL", "ROUGE-L, teacher-forced argmax", forced=True),
    Column("training s", "seconds of training, no loading, encoding or evaluation, and without the warm-up steps",
           lambda r: {"training_seconds": r.train_seconds}, _seconds),
    Column(
        "tokens/s", "real tokens (no padding, no virtual ones) trained on per second, over all processes",
        lambda r: {f"{kind}_tokens_per_second": _speed(r, kind) for kind in TokensPerSecond.model_fields},
        lambda r: "–" if (speed := _speed(r, "real")) is None else f"{speed:,.0f}",
        optional=True,
    ),
    Column(
        "peak MiB", "most memory while training: in tensors on the GPU; on CPU resident memory beyond what the process "
        "had before anything was loaded",
        lambda r: {"train_peak_bytes": train_peak_bytes(r)} | _allocator(r),
        lambda r: "–" if (peak := train_peak_bytes(r)) is None else f"{peak / 2**20:,.0f}",
        optional=True,
    ),
    Column(
        "needs MiB", "of a run that was out of memory: what its process is predicted to hold at its peak, at least, "
        "by peftbench estimate",
        lambda r: {
            "needed_bytes": r.outcome.needed_bytes, "held_bytes": r.outcome.held_bytes,
            "requested_bytes": r.outcome.requested_bytes,
        },
        lambda r: "–" if (needed := r.outcome.needed_bytes) is None else f"{needed / 2**20:,.0f}",
        optional=True,
    ),
    Column(
        "required TFLOP", "floating-point operations that all steps needed, in 10^12: real tokens, causal attention, "
        "the output head at labels, a backward pass only where the method needs one",
        lambda r: {f"{kind}_flops": getattr(r.flops, kind) for kind in ("required", "executed", "six_n")},
        lambda r: "–" if r.flops.required is None else f"{r.flops.required / 1e12:.3g}",
        optional=True,
    ),
    Column(
        "MFU", "model FLOPs utilisation: required FLOPs a second, of the device's peak by its maker's data sheet",
        lambda r: {"mfu": r.compute.mfu, "hfu": r.compute.hfu},
        lambda r: _measured(r, None if r.compute.mfu is None else f"{r.compute.mfu:.1%}"),
        optional=True,
    ),
    Column(
        "of achievable", "required FLOPs a second, of what a large matrix product then achieved on the device",
        lambda r: {"of_achievable": r.compute.of_achievable},
        lambda r: "–" if r.compute.of_achievable is None else f"{r.compute.of_achievable:.1%}",
        optional=True,
    ),
    Column(
        "J/1,000 samples", "joules of the training phase by 1,000 samples: of the GPUs' boards (NVML), or of the "
        "processors (RAPL) where it ran on them, whatever else ran there; pauses (trackers) included",
        lambda r: {"joules_per_1000_samples": r.joules_per_1000_samples, "training_joules": r.energy_joules},
        lambda r: _measured(r, None if (j := r.joules_per_1000_samples) is None else f"{j:,.3g}"),
        optional=True,
    ),
    Column(
        "price", "of the seconds of training on all devices, at profile.price_per_hour",
        lambda r: {"training_price": r.training_price},
        lambda r: "–" if r.training_price is None else f"{r.training_price:,.2g}",
        optional=True,
    ),
    Column("outcome", "how the run ended", lambda r: {"outcome": r.outcome.kind}, outcome_text),
)  # fmt: skip
