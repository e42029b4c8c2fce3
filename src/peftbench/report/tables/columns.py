"""Columns of the comparison table: text, raw values and descriptions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftbench.record import Interval, RunRecord, TokensPerSecond, train_peak_bytes
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


def _rouge_column(rouge_type: str, title: str, *, teacher_forced: bool = False) -> Column:
    name = f"teacher_forced_argmax_{rouge_type}" if teacher_forced else rouge_type

    def get_score(record: RunRecord) -> Interval | None:
        if record.quality is None:
            return None
        scores = record.quality.teacher_forced_argmax_rouge if teacher_forced else record.quality.rouge
        return (scores or {}).get(rouge_type)

    def raw(record: RunRecord) -> dict[str, CellValue]:
        score = get_score(record)
        values = (score.mean, score.low, score.high) if score else (None, None, None)
        return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))

    def text(record: RunRecord) -> str:
        score = get_score(record)
        return f"{score.mean:.1f} ({score.low:.1f}–{score.high:.1f})" if score else "–"

    condition = "under teacher forcing (the original study's metric)" if teacher_forced else "of generated summaries"
    return Column(
        title,
        f"{rouge_type} F-measure {condition}, in percent, with 95 % bootstrap interval over examples.",
        raw,
        text,
        optional=True,
    )


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


def _allocator_values(record: RunRecord) -> dict[str, CellValue]:
    """Return statistics of the CUDA allocator in the training phase; None on CPU."""
    memory = record.memory.get("train")
    return {
        "train_reserved_bytes": memory.reserved_bytes if memory else None,
        "train_fragmentation": memory.fragmentation if memory else None,
        "train_num_alloc_retries": memory.num_alloc_retries if memory else None,
    }


def format_outcome(record: RunRecord) -> str:
    """Return the outcome, with the step of a failure."""
    outcome = record.outcome
    return outcome.kind + (f" at step {outcome.step}" if outcome.step is not None else "")


DROP_ORDER = (
    "ROUGE-Lsum",
    "ROUGE-2",
    "ROUGE-1",
    "trainable %",
    "training cost",
    "forgetting (nats)",
    "model compute (TFLOP)",
    "% of measured matmul FLOP/s",
    "energy (J / 1k samples)",
    "MFU",
    "trainable params",
    "tokens/s",
)
"""Columns dropped on a narrow terminal, in this order; the report has them."""

COLUMNS: tuple[Column, ...] = (
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
        "held-out loss",
        "Mean cross-entropy over summary tokens and EOS token of the test examples, in nats; lower is better.",
        lambda r: {"held_out_loss": _held_out_loss(r)},
        lambda r: "–" if (loss := _held_out_loss(r)) is None else f"{loss:.3f}",
    ),
    _rouge_column("rouge1", "ROUGE-1"),
    _rouge_column("rouge2", "ROUGE-2"),
    _rouge_column("rougeL", "ROUGE-L"),
    _rouge_column("rougeLsum", "ROUGE-Lsum"),
    _rouge_column("rougeL", "ROUGE-L, teacher-forced argmax", teacher_forced=True),
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
    Column("outcome", "How the run ended.", lambda r: {"outcome": r.outcome.kind}, format_outcome),
)
