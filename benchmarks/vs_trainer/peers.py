"""The arms of HF Trainer and TRL's SFTTrainer; their own steps are timed through callbacks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy
import torch
from clock import StepClock
from examples import Examples
from spec import NEEDS_TRL, Job, peer_settings
from trained import COUNTED_STEP, Applied, Trained, applied
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from peftbench.profiler.flop_counter import FlopCounter
from peftbench.profiler.memory import MemoryMeter

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
"""Label of a position without loss, as in transformers."""
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass(eq=False)
class Watch(TrainerCallback):  # type: ignore[misc]  # transformers' class has no types
    """Records a trainer's losses and tokens without synchronizing with the device."""

    clock: StepClock
    accumulation: int
    losses: list[torch.Tensor] = field(default_factory=list)
    """Loss of each micro-batch, divided by the labels of the whole step; they add up to the step's loss."""
    tokens: list[tuple[int, int]] = field(default_factory=list)
    """Real tokens and labels of each collated micro-batch."""
    counter: FlopCounter = field(default_factory=FlopCounter)

    def on_step_end(self, *_: object, **__: object) -> None:
        self.clock.step_ended()

    def count_flops(self) -> AbstractContextManager[object]:
        """Return a FLOP counter for the micro-batches of the counted step, otherwise a null context."""
        return self.counter if len(self.losses) // self.accumulation == COUNTED_STEP - 1 else nullcontext()

    def record_tokens(self, collate: Collate) -> Collate:
        """Return a collator that records its tokens."""

        def collate_and_record(rows: list[dict[str, Any]]) -> dict[str, Any]:
            real = sum(sum(row["attention_mask"]) if "attention_mask" in row else len(row["input_ids"]) for row in rows)
            self.tokens.append((real, sum(_labeled(row["labels"]) for row in rows)))
            return collate(rows)

        return collate_and_record

    def step_losses(self) -> tuple[float, ...]:
        """Return the loss of each step."""
        return tuple(float(sum(part)) for part in _parts([loss.item() for loss in self.losses], self.accumulation))

    def step_tokens(self, index: int) -> tuple[int, ...]:
        """Return real tokens (0) or labels (1) of each step; the loader may have collated one batch too many."""
        trained = [pair[index] for pair in self.tokens[: len(self.losses)]]
        return tuple(sum(part) for part in _parts(trained, self.accumulation))


def _parts(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _labeled(labels: list[int] | numpy.ndarray) -> int:
    """Return the number of labels; fast, since it runs within a timed step."""
    ignored = labels.count(IGNORED) if isinstance(labels, list) else numpy.count_nonzero(labels == IGNORED)
    return len(labels) - int(ignored)


class Watched:
    """Mixin of a trainer that passes each micro-batch's loss to the watch."""

    watch: Watch

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """Run the trainer's step and record its loss."""
        with self.watch.count_flops():
            loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.watch.losses.append(loss)
        return loss


class WatchedTrainer(Watched, Trainer):
    """HF Trainer with a watch."""


def flattens(job: Job) -> bool:
    """True if this arm flattens a batch into one row: with flash attention, and if peft keeps position ids."""
    if not job.arm.endswith("_best") or job.case == "prompt_tuning":  # peft drops position ids with virtual tokens
        return False
    return job.spec.device == "cuda" and bool(is_flash_attn_2_available())


def run(job: Job, examples: Examples, positions: int, meter: MemoryMeter) -> Trained:
    """Train and return the measurements."""
    spec, flat = job.spec, flattens(job)
    model = applied(job, flattens=flat)
    cost = model.cost()
    model_flops = (
        cost.compute_model_flops(examples.count_flop_units(COUNTED_STEP - 1, model.method.virtual_tokens))
        if cost
        else None
    )
    settings = peer_settings(job.arm, spec, flattens=flat)
    width = positions - model.method.virtual_tokens
    tokenizer = model.base.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    total = spec.total_steps(job.case)
    clock = StepClock(torch.device(spec.device), spec.untimed_steps(job.case), total, meter)
    watch = Watch(clock, settings["gradient_accumulation_steps"])
    with tempfile.TemporaryDirectory() as folder:
        build_trainer = _build_sft_trainer if job.arm in NEEDS_TRL else _build_hf_trainer
        trainer = build_trainer(
            job, model, _shared_arguments(job, folder) | settings, _build_rows(job, examples, width)
        )
        trainer.watch = watch
        trainer.data_collator = watch.record_tokens(trainer.data_collator)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        trainer.train()
    assert clock.memory is not None
    return Trained(
        losses=watch.step_losses(),
        step_seconds=clock.step_seconds,
        seconds=clock.seconds,
        real_tokens=watch.step_tokens(0),
        labeled_tokens=watch.step_tokens(1),
        memory=clock.memory,
        model_flops=model_flops,
        hardware_flops=None
        if flat
        else watch.counter.total_flops,  # torch's counter does not know flash-attn's kernels
        trainable_parameters=model.trainable_parameters,
        model_fingerprint=model.base.fingerprint,
        settings=settings,
        notes=tuple(_list_notes(job, flat)),
    )


def _shared_arguments(job: Job, folder: str) -> dict[str, Any]:
    """Return the arguments that all peers share."""
    spec = job.spec
    return {
        "output_dir": folder,
        "use_cpu": spec.device == "cpu",
        "seed": spec.seed,
        "max_steps": spec.total_steps(job.case),
        "learning_rate": spec.learning_rate,
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
    }


def _build_rows(job: Job, examples: Examples, width: int) -> Dataset:
    """Return all steps' examples in order, with labels at their summaries.

    TRL's best arm gets arrays, which its collator (like peftbench's) converts faster than lists. HF Trainer's collators
    convert arrays to lists first, which is slower.
    """
    from datasets import Dataset

    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    padded = job.arm == "hf_study"
    if padded:
        columns["attention_mask"] = []
    for ids, prompt in (row for index in range(len(examples.batches)) for row in examples.step(index)):
        rest = width - len(ids) if padded else 0
        columns["input_ids"].append([*ids, *[examples.end] * rest])
        columns["labels"].append([*[IGNORED] * prompt, *ids[prompt:], *[IGNORED] * rest])
        if padded:
            columns["attention_mask"].append([1] * len(ids) + [0] * rest)
    rows = Dataset.from_dict(columns)
    return rows.with_format("numpy") if job.arm == "trl_best" else rows


def _build_hf_trainer(job: Job, model: Applied, arguments: dict[str, Any], rows: Dataset) -> Any:  # noqa: ANN401
    """Build HF Trainer; the study's arm pads every row fully, the best arm to the longest of a batch."""
    if job.arm == "hf_study":
        collate: Any = default_data_collator
    elif flattens(job):
        collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    else:
        collate = DataCollatorForSeq2Seq(model.base.tokenizer, label_pad_token_id=IGNORED)
    return WatchedTrainer(
        model=model.model, args=TrainingArguments(**arguments), train_dataset=rows, data_collator=collate
    )


def _build_sft_trainer(job: Job, model: Applied, arguments: dict[str, Any], rows: Dataset) -> Any:  # noqa: ANN401
    """Build TRL's SFTTrainer over encoded rows."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class WatchedSFTTrainer(Watched, SFTTrainer):  # type: ignore[misc]
        """TRL's SFTTrainer with a watch."""

    return WatchedSFTTrainer(
        model=model.model,  # type: ignore[arg-type]  # a method's model is typed as a module
        args=SFTConfig(**arguments),
        train_dataset=rows,
        processing_class=model.base.tokenizer,
    )


def _list_notes(job: Job, flat: bool) -> Iterator[str]:
    if job.arm in NEEDS_TRL:
        yield f"trl {metadata.version('trl')}"
    if job.arm.endswith("_best") and not flat:
        why = (
            "peft drops the position ids of a flattened batch"
            if job.case == "prompt_tuning"
            else "flash-attn is not installed"
        )
        yield f"padded, not flattened: {why}"
