"""RunState: everything known about one run, filled as the run progresses."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peftbench.distributed.sharding import state_bytes
from peftbench.record import Forgetting, HeldOutCurve, MemoryBreakdown, Quality, RunRecord, SplitOverlap, StateBytes
from peftbench.run.rank_measurements import RankMeasurements
from peftbench.training.loop import TrainProgress

if TYPE_CHECKING:
    from accelerate import Accelerator

    from peftbench.distributed.accelerator import AcceleratorContext
    from peftbench.distributed.engines import EngineKind
    from peftbench.profiler.instruments import StepInstruments
    from peftbench.profiler.probe import Probe
    from peftbench.recipe.schema import Recipe
    from peftbench.run.trackers import Trackers
    from peftbench.run_dir.layout import RunDir
    from peftbench.training.build import AdaptedModel, TrainingComponents


def _get_utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass
class RunState:
    """State of one run; filled as the run progresses, so that any outcome yields a complete record."""

    requested_recipe: Recipe
    """The recipe as given, with the precision and attention that ``auto`` resolved to."""
    recipe: Recipe
    """The requested recipe with ``train.micro_batch_size=auto`` resolved too."""
    run_dir: RunDir
    context: AcceleratorContext
    probe: Probe
    notes: list[str] = field(default_factory=list)
    """Sentences for the record."""
    started_at: str = field(default_factory=_get_utc_now)
    """ISO 8601, UTC."""
    progress: TrainProgress = field(default_factory=TrainProgress)
    adapted_model: AdaptedModel | None = None
    training: TrainingComponents | None = None
    instruments: StepInstruments | None = None
    trackers: Trackers | None = None
    quality: Quality | None = None
    held_out_curve: HeldOutCurve | None = None
    """Evaluations during training."""
    forgetting: Forgetting | None = None
    num_examples: dict[str, int] = field(default_factory=dict)
    """Examples used, by split."""
    num_dropped: dict[str, int] = field(default_factory=dict)
    """Examples dropped, by split."""
    num_cut: dict[str, int] = field(default_factory=dict)
    """Examples that are cut, by split."""
    num_cut_labels: dict[str, int] = field(default_factory=dict)
    """Labeled tokens that are cut, by split."""
    num_with_control_tokens: dict[str, int] = field(default_factory=dict)
    """Examples with control tokens in their text, by split."""
    stop_ids: list[int] = field(default_factory=list)
    """Ids that end a generated text; none if the task generates nothing."""
    split_overlap: SplitOverlap | None = None
    data_fingerprint: str | None = None
    training_data_fingerprint: str | None = None
    """Fingerprint of the training split alone."""
    trained_record: RunRecord | None = None
    """Record of the earlier process that trained the model, if this one only evaluates it."""
    has_saved_model: bool = False
    """True once the folder has this training's model."""
    has_outputs: bool = False
    """True once the folder has this run's generated texts."""
    resumed_after: list[int] = field(default_factory=list)
    """Steps after which a process resumed this training."""
    resumed_measurements: dict[str, Any] = field(default_factory=dict)
    """Measurements that an earlier process made in steps that are not repeated."""
    rank_measurements: RankMeasurements | None = None
    """Gathered after the training, and again at the end of the run; None before."""
    matmul_flops: float | None = None
    """FLOP/s of a large matrix product on this rank's device, measured after the training."""

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator."""
        return self.context.accelerator

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the training; it must have been built."""
        assert self.training is not None
        return self.training.total_steps

    @property
    def is_trained(self) -> bool:
        """True once all steps are completed, or early stopping ended the training."""
        return self.training is not None and not self.progress.count_remaining_steps(self.total_steps)

    @property
    def engine(self) -> EngineKind:
        """The distributed engine."""
        return self.context.engine

    def set_example_counts(self, split: str, used: int, dropped: int) -> None:
        """Record how many examples of a split are used, and how many were dropped."""
        self.num_examples[split] = used
        self.num_dropped[split] = dropped

    def get_current_position(self) -> dict[str, Any]:
        """Return phase, step and part of the step that is running, as keyword arguments of ``Outcome``."""
        position: dict[str, Any] = {"phase": self.probe.current_phase, "step": None, "step_part": None}
        if self.probe.current_phase in {"warmup", "train"}:
            position |= {"step": self.progress.completed_steps + 1, "step_part": self.probe.current_step_part}
        return position

    def get_trained_steps(self) -> int:
        """Return the number of steps that the evaluated model was trained."""
        return self.trained_record.steps if self.trained_record is not None else self.progress.completed_steps

    def get_counted_flops(self) -> int | None:
        """Return the FLOPs counted in a step on this rank, by this process or by the one before it."""
        counter = self.instruments.flop_counter if self.instruments is not None else None
        if counter is not None and self.progress.completed_steps:
            return counter.total_flops
        counted: int | None = self.resumed_measurements.get("counted_flops")
        return counted

    def build_memory_breakdown(self) -> MemoryBreakdown | None:
        """Return the memory at its peak by category, measured by this process or by the one before it."""
        if resumed := self.resumed_measurements.get("memory_breakdown"):
            return MemoryBreakdown(**resumed)
        step = self.recipe.profile.untimed_steps
        tracker = self.instruments.memory_tracker if self.instruments is not None else None
        if tracker is None or self.progress.completed_steps < step:
            return None
        peak, (micro_batch_size, sequence_length) = tracker.find_peak(), self.progress.step_shapes[step - 1]
        return MemoryBreakdown(
            step=step,
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            peak_bytes=peak.nbytes,
            bytes_by_category=peak.bytes_by_category,
            operation=peak.operation,
            step_part=peak.step_part,
        )

    def measure_state_bytes(self) -> StateBytes | None:
        """Return the bytes of weights, gradients and optimizer states on this rank, None before the first step."""
        if self.adapted_model is None or self.training is None or not self.progress.completed_steps:
            return None
        device = self.accelerator.device.type
        return state_bytes(
            self.engine, self.adapted_model.model, self.training.optimizer, self.recipe.optimizer, device
        )

    def gather_rank_measurements(self) -> None:
        """Gather the measurements of all ranks. Collective: every rank must call it."""
        self.rank_measurements = RankMeasurements.gather(
            self.accelerator,
            self.probe,
            counted_flops=self.get_counted_flops(),
            state_bytes=self.measure_state_bytes(),
            matmul_flops=self.matmul_flops,
        )
