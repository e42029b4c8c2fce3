"""Columns of the comparison table: text, raw values and descriptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftbench.record import Interval, RunRecord, ScoreDefinition, TokensPerSecond, train_peak_bytes
from peftbench.report.analysis.memory_prediction import (
    compute_predicted_ratio,
    find_card,
    format_card,
    get_predicted_bytes,
)
from peftbench.report.analysis.quality_metrics import QualityMetric, list_headline_metrics, list_scores
from peftbench.report.runs import method_kind, run_label
from peftbench.report.text.formatting import CellValue

UNKNOWN_TEXT = "unknown"


@dataclass(frozen=True)
class Column:
    """One column. ``raw_values`` returns values by CSV name (with units); ``format_text`` shows the first."""

    title: str
    description: str
    raw_values: Callable[[RunRecord], dict[str, CellValue]]
    format_text: Callable[[RunRecord], str]
    optional: bool = False
    """Shown only if a record has a value, "unknown" included."""


def _format_count(value: int | None) -> str:
    return UNKNOWN_TEXT if value is None else f"{value:,}"


def _trainable_parameters(record: RunRecord) -> int | None:
    return record.parameters.trainable if record.parameters else None


def _trainable_fraction(record: RunRecord) -> float | None:
    return record.parameters.trainable / record.parameters.total if record.parameters else None


def _format_train_seconds(record: RunRecord) -> str:
    seconds = record.train_seconds
    return "–" if seconds is None else f"{seconds:.1f}"


def _tokens_per_second(record: RunRecord, kind: str) -> float | None:
    return getattr(record.throughput.tokens_per_second, kind) if record.throughput else None


def _text_or_unknown(record: RunRecord, text: str | None) -> str:
    """Return ``text``; if empty, "unknown" for a run with timed steps and a dash for others."""
    return text or (UNKNOWN_TEXT if record.throughput else "–")


def _held_out_loss(record: RunRecord) -> float | None:
    return record.quality.loss if record.quality else None


def _score_column(metric: QualityMetric, *, teacher_forced: bool = False) -> Column:
    """Return the column of a score, or of that of the teacher-forced argmax."""
    definition, score_name = metric.definition, str(metric.score_name)
    name = f"teacher_forced_argmax_{score_name}" if teacher_forced else score_name
    description = definition.description or definition.title
    if teacher_forced:
        description = f"{description} under teacher forcing (the original study's metric)"

    def get_interval(record: RunRecord) -> Interval | None:
        if record.quality is None:
            return None
        scores = record.quality.teacher_forced_metrics if teacher_forced else record.quality.metrics
        return scores[score_name].interval if score_name in scores else None

    def raw(record: RunRecord) -> dict[str, CellValue]:
        interval = get_interval(record)
        values = (interval.mean, interval.low, interval.high) if interval else (None, None, None)
        return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))

    def text(record: RunRecord) -> str:
        interval, digits = get_interval(record), definition.digits
        if interval is None:
            return "–"
        return f"{interval.mean:.{digits}f} ({interval.low:.{digits}f}–{interval.high:.{digits}f})"

    return Column(
        f"{definition.title}, teacher-forced argmax" if teacher_forced else definition.title,
        f"{description}, with 95 % bootstrap interval over examples{_describe_direction(definition)}.",
        raw,
        text,
        optional=True,
    )


def _describe_direction(definition: ScoreDefinition) -> str:
    return "" if definition.higher_is_better else "; lower is better"


def _forgetting_values(record: RunRecord) -> dict[str, CellValue]:
    """Return the increase of the loss on the general text, and both losses."""
    forgetting = record.forgetting
    return {
        "forgetting": forgetting.increase if forgetting else None,
        "general_text_loss_before": forgetting.loss_before if forgetting else None,
        "general_text_loss_after": forgetting.loss_after if forgetting else None,
    }


def _format_forgetting(record: RunRecord) -> str:
    increase = record.forgetting.increase if record.forgetting else None
    return "–" if increase is None else f"{increase:+.3f}"


def _format_merges(record: RunRecord) -> str:
    merges = record.saved_model.merges_into_base if record.saved_model else None
    return "–" if merges is None else "yes" if merges else "no"


def _allocator_values(record: RunRecord) -> dict[str, CellValue]:
    """Return statistics of the CUDA allocator in the training phase; None on CPU."""
    memory = record.memory.get("train")
    return {
        "train_reserved_bytes": memory.reserved_bytes if memory else None,
        "train_fragmentation": memory.fragmentation if memory else None,
        "train_num_alloc_retries": memory.num_alloc_retries if memory else None,
    }


def _plan_values(record: RunRecord) -> dict[str, CellValue]:
    """Return the predicted sizes, and the predicted over the measured peak."""
    planned = record.plan.predicted if record.plan is not None else None
    return {
        "planned_bytes": get_predicted_bytes(record),
        "planned_over_measured": compute_predicted_ratio(record),
        "planned_live_bytes": planned.live_bytes if planned else None,
        "planned_reserved_bytes": planned.reserved_bytes if planned else None,
        "planned_process_bytes_min": planned.process_bytes[0] if planned else None,
        "planned_process_bytes_max": planned.process_bytes[1] if planned else None,
    }


def _format_planned(record: RunRecord) -> str:
    planned, ratio = get_predicted_bytes(record), compute_predicted_ratio(record)
    if planned is None:
        return "–"
    return f"{planned / 2**20:,.0f}" + ("" if ratio is None else f" ({ratio:.2f}x)")


def _card_values(record: RunRecord) -> dict[str, CellValue]:
    card = find_card(record)
    return {"fits_in_gigabytes": card.gigabytes if card is not None else None}


def format_outcome(record: RunRecord) -> str:
    """Return the outcome, with the step of a failure."""
    outcome = record.outcome
    return outcome.kind + (f" at step {outcome.step}" if outcome.step is not None else "")


_DROP_ORDER = (
    "trainable %",
    "training cost",
    "saved (MiB)",
    "merges",
    "fits in",
    "planned mem (MiB)",
    "startup (s)",
    "added, frozen",
    "forgetting (nats)",
    "model compute (TFLOP)",
    "% of measured matmul FLOP/s",
    "energy (J / 1k samples)",
    "MFU",
    "trainable params",
    "tokens/s",
)
"""Columns dropped on a narrow terminal after the scores, in this order; the report has them."""

_COLUMNS_BEFORE_SCORES: tuple[Column, ...] = (
    Column(
        "run",
        "Name of the run, with its method if the name lacks it.",
        lambda r: {"run": r.name, "method": method_kind(r)},
        run_label,
    ),
    Column(
        "trainable params",
        "Number of trainable parameters.",
        lambda r: {"trainable_parameters": _trainable_parameters(r)},
        lambda r: "–" if _trainable_parameters(r) is None else _format_count(_trainable_parameters(r)),
    ),
    Column(
        "trainable %",
        "Trainable parameters in percent of all parameters of the model.",
        lambda r: {"trainable_fraction": _trainable_fraction(r)},
        lambda r: "–" if (share := _trainable_fraction(r)) is None else f"{share:.2%}",
    ),
    Column(
        "added, frozen",
        "Numbers that the method adds to the model and does not train, e.g. random projections.",
        lambda r: {"added_frozen_parameters": r.parameters.added_frozen if r.parameters else None},
        lambda r: "–" if not (r.parameters and r.parameters.added_frozen) else _format_count(r.parameters.added_frozen),
        optional=True,
    ),
    Column(
        "held-out loss",
        "Mean cross-entropy over the labeled tokens of the test examples, in nats; lower is better.",
        lambda r: {"held_out_loss": _held_out_loss(r)},
        lambda r: "–" if (loss := _held_out_loss(r)) is None else f"{loss:.3f}",
    ),
)

_COLUMNS_AFTER_SCORES: tuple[Column, ...] = (
    Column(
        "forgetting (nats)",
        "Loss on the text of evaluate.general_text after the training minus before, in nats per token; above 0, the "
        "model has become worse on it.",
        _forgetting_values,
        _format_forgetting,
        optional=True,
    ),
    Column(
        "train time (s)",
        "Seconds of training steps, without the first ones (profile.untimed_steps), loading, tokenization and "
        "evaluation.",
        lambda r: {"train_seconds": r.train_seconds},
        _format_train_seconds,
    ),
    Column(
        "startup (s)",
        "Seconds before the first step: trying the method, loading, encoding and building.",
        lambda r: {"startup_seconds": r.startup_seconds},
        lambda r: "–" if r.startup_seconds is None else f"{r.startup_seconds:,.1f}",
        optional=True,
    ),
    Column(
        "tokens/s",
        "Real tokens (no padding, no virtual tokens) trained on per second, summed over all processes.",
        lambda r: {f"{kind}_tokens_per_second": _tokens_per_second(r, kind) for kind in TokensPerSecond.model_fields},
        lambda r: "–" if (speed := _tokens_per_second(r, "real")) is None else f"{speed:,.0f}",
        optional=True,
    ),
    Column(
        "peak mem (MiB)",
        "Peak memory of the training phase: on a GPU, memory allocated to tensors (max_memory_allocated); on CPU, RSS "
        "above its value before anything was loaded. That includes libraries imported later and freed blocks that the "
        "C library keeps; peftbench estimate includes both in resident, not in process.",
        lambda r: {"train_peak_bytes": train_peak_bytes(r)} | _allocator_values(r),
        lambda r: "–" if (peak := train_peak_bytes(r)) is None else f"{peak / 2**20:,.0f}",
        optional=True,
    ),
    Column(
        "est. need (MiB)",
        "For runs that ran out of memory: predicted peak memory of the process (lower bound), from peftbench estimate.",
        lambda r: {
            "estimated_peak_bytes": r.outcome.estimated_peak_bytes,
            "in_use_bytes": r.outcome.in_use_bytes,
            "requested_bytes": r.outcome.requested_bytes,
        },
        lambda r: "–" if (needed := r.outcome.estimated_peak_bytes) is None else f"{needed / 2**20:,.0f}",
        optional=True,
    ),
    Column(
        "planned mem (MiB)",
        "Predicted peak memory of the training for the run's own rows (plan in the record): on a GPU, memory allocated "
        "to tensors; on CPU, live tensors. In brackets: divided by the measured peak, on CPU by that of "
        "profile.memory_breakdown.",
        _plan_values,
        _format_planned,
        optional=True,
    ),
    Column(
        "fits in",
        "The smallest card, by its memory, in which the measured run fits: the most memory that torch reserved on the "
        "GPU in any phase, plus the largest known context and workspaces of such cards. Per process, and only for runs "
        "on a GPU.",
        _card_values,
        format_card,
        optional=True,
    ),
    Column(
        "model compute (TFLOP)",
        "Floating-point operations required by all steps, in 10^12: real tokens, causal attention, "
        "output head at labeled positions, backward pass only where the method needs it.",
        lambda r: {
            "model_flops": r.flops.model_flops,
            "hardware_flops": r.flops.hardware_flops,
            "six_n_flops": r.flops.six_n,
        },
        lambda r: "–" if r.flops.model_flops is None else f"{r.flops.model_flops / 1e12:.3g}",
        optional=True,
    ),
    Column(
        "MFU",
        "Model FLOPs utilization: model FLOPs per second over the device's data sheet peak.",
        lambda r: {"mfu": r.compute.mfu, "hfu": r.compute.hfu},
        lambda r: _text_or_unknown(r, None if r.compute.mfu is None else f"{r.compute.mfu:.1%}"),
        optional=True,
    ),
    Column(
        "% of measured matmul FLOP/s",
        "Model FLOPs per second over the FLOP/s of a large matrix product, measured on the device after the run.",
        lambda r: {"matmul_utilization": r.compute.matmul_utilization},
        lambda r: "–" if r.compute.matmul_utilization is None else f"{r.compute.matmul_utilization:.1%}",
        optional=True,
    ),
    Column(
        "energy (J / 1k samples)",
        "Joules of the training phase per 1,000 training examples: all GPUs of the run (NVML), or the CPU packages "
        "(RAPL) for runs on CPU, including other processes and the time that experiment trackers take, without "
        "evaluations.",
        lambda r: {"joules_per_1000_samples": r.joules_per_1000_samples, "train_joules": r.energy_joules},
        lambda r: _text_or_unknown(r, None if (j := r.joules_per_1000_samples) is None else f"{j:,.3g}"),
        optional=True,
    ),
    Column(
        "training cost",
        "Training time, times the number of devices, times profile.price_per_hour.",
        lambda r: {"training_cost": r.training_cost},
        lambda r: "–" if r.training_cost is None else f"{r.training_cost:,.2g}",
        optional=True,
    ),
    Column(
        "saved (MiB)",
        "Size of the saved weights: of an adapter, or of the whole model.",
        lambda r: {"saved_weight_bytes": r.saved_model.weight_bytes if r.saved_model else None},
        lambda r: "–" if r.saved_model is None else f"{r.saved_model.weight_bytes / 2**20:,.3g}",
        optional=True,
    ),
    Column(
        "merges",
        "Whether the saved adapter can be merged into the base model's weights; inference then has no extra cost.",
        lambda r: {"merges_into_base": r.saved_model.merges_into_base if r.saved_model else None},
        _format_merges,
        optional=True,
    ),
    Column("outcome", "How the run ended.", lambda r: {"outcome": r.outcome.kind}, format_outcome),
)


def build_columns(records: Sequence[RunRecord]) -> list[Column]:
    """Return all columns, with one for each score of the records."""
    forced = [
        metric
        for metric in list_headline_metrics(records)
        if any(record.quality and metric.score_name in record.quality.teacher_forced_metrics for record in records)
    ]
    return list_columns(list_scores(records), forced)


def list_columns(scores: Sequence[QualityMetric], teacher_forced: Sequence[QualityMetric] = ()) -> list[Column]:
    """Return all columns, with one for each of these scores. Scores of the same title are shown with their names."""
    titles = [metric.name for metric in scores]
    return [
        *_COLUMNS_BEFORE_SCORES,
        *(_score_column(_with_unique_title(metric, titles)) for metric in scores),
        *(_score_column(_with_unique_title(metric, titles), teacher_forced=True) for metric in teacher_forced),
        *_COLUMNS_AFTER_SCORES,
    ]


def _with_unique_title(metric: QualityMetric, titles: Sequence[str]) -> QualityMetric:
    if titles.count(metric.name) < 2:
        return metric
    title = f"{metric.name} ({metric.score_name})"
    return QualityMetric(metric.score_name, metric.definition.model_copy(update={"title": title}))


def build_drop_order(records: Sequence[RunRecord]) -> list[str]:
    """Return the titles of the columns to drop on a narrow terminal: first the scores other than headline metrics."""
    headlines = list_headline_metrics(records)
    others = [metric.name for metric in list_scores(records) if metric not in headlines]
    return [*reversed(others), *_DROP_ORDER]
