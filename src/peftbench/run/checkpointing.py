"""TrainingCheckpointer: save and resume a training, and end it on a stop request."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from peftbench.distributed.collectives import all_gather_objects
from peftbench.errors import CheckpointError, TimeLimitError
from peftbench.optim import OPTIMIZER_LIBRARIES
from peftbench.record import HeldOutCurve
from peftbench.record.environment import get_library_versions
from peftbench.run.best_weights import BestWeights
from peftbench.run.shutdown import StopRequested
from peftbench.run_dir.stop_request import STOP_LEAD_ENV
from peftbench.training.checkpoint import CheckpointManager, CheckpointMetadata
from peftbench.training.state import capture_state, load_state

if TYPE_CHECKING:
    from peftbench.run.shutdown import ShutdownSignal
    from peftbench.run.state import RunState
    from peftbench.training.build import AdaptedModel, TrainingComponents
    from peftbench.training.callbacks import StepInfo


INITIAL_VALUES_KEY = "initial_values"
"""Key, in a checkpoint, of the initial values that the method computed."""


class TrainingCheckpointer:
    """Checkpoints of one training. A step callback; the last one, since it may end the training."""

    def __init__(
        self,
        state: RunState,
        adapted_model: AdaptedModel,
        training: TrainingComponents,
        shutdown_signal: ShutdownSignal,
    ) -> None:
        self.state, self.adapted_model, self.training = state, adapted_model, training
        self.shutdown_signal = shutdown_signal
        self.checkpoint_manager = build_checkpoint_manager(state, adapted_model)
        self.best_weights: BestWeights | None = None
        """Weights with the lowest held-out loss, with ``checkpoint.keep_best``."""
        if state.recipe.checkpoint.keep_best:
            self.best_weights = BestWeights(state, adapted_model, training, self.checkpoint_manager)
        self.resume_step = 0
        """Steps completed before this process."""
        self.last_saved_step: int | None = None
        """Step of the newest checkpoint, None before the first."""
        self.save_seconds = 0.0
        """Seconds that the last save took."""

    def maybe_resume(self) -> None:
        """Resume from the newest checkpoint of this training, if there is one.

        Raises:
            CheckpointError: the checkpoint does not fit this launch, or cannot be read.
        """
        state, progress = self.state, self.state.progress
        checkpoint = self.checkpoint_manager.latest()
        state.notes += self.checkpoint_manager.notes
        if checkpoint is None:
            self._delete_unused_weights()
            if self.checkpoint_manager.notes and state.accelerator.is_main_process:
                sys.stderr.write(f"note: training starts at step 0: {'; '.join(self.checkpoint_manager.notes)}\n")
            return
        saved, is_own = self.checkpoint_manager.load(checkpoint)
        metadata, own_metadata = checkpoint.metadata, self.checkpoint_manager.metadata
        has_same_settings = metadata.measurement_fingerprint == own_metadata.measurement_fingerprint
        is_measured = is_own and has_same_settings
        problem = None
        try:
            load_state(
                saved, state.accelerator, self.training, self.adapted_model.model, progress, restore_rng_state=is_own
            )
        except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            problem = f"Cannot resume from {checkpoint.path}: {error}"
        if problems := [text for text in all_gather_objects(state.accelerator, problem) if text is not None]:
            raise CheckpointError(problems[0], f"delete {checkpoint.path.parent} to start over")
        self.training.start_step(progress.completed_steps - 1)  # the states are those of the last step
        state.probe.load_state_dict(saved["probe"], with_measurements=is_measured)
        state.resumed_measurements = saved["measurements"] if is_measured else {}
        if (curve := saved.get("held_out_curve")) is not None:
            state.held_out_curve = HeldOutCurve.model_validate(curve)
        self._delete_unused_weights()
        self.resume_step = self.last_saved_step = progress.completed_steps
        state.resumed_after = [*saved["resumed_after"], self.resume_step]
        if not is_measured:
            difference = (
                f"on {metadata.world_size} processes"
                if metadata.world_size != own_metadata.world_size
                else "with other settings (profile, budget, micro-batch size or evaluate.interval)"
            )
            state.notes.append(
                f"The first {self.resume_step} steps ran {difference} and are excluded from speed, memory and energy."
            )
        state.notes.append(f"Resumed from step {self.resume_step}.")

    def after_step(self, info: StepInfo) -> None:
        """Save a checkpoint if one is due; end the training if any rank was requested to stop.

        Raises:
            StopRequested: a rank was requested to stop; the checkpoint is saved.
            TimeLimitError: a step and its checkpoint take longer than the time between stop request and time limit.
        """
        reason, interval = self._reduce_stop_reason(), self.state.recipe.checkpoint.interval
        if reason is not None or (interval and info.step % interval == 0):
            self.save()
        if reason is not None:
            raise StopRequested(reason, on_all_ranks=True)
        self._check_time_limit(info.step)

    def save_before_evaluation(self) -> None:
        """Save a checkpoint after the last step of a distributed run that may be interrupted.

        Saving is collective, and while the model is saved or evaluated the ranks could not agree on a moment for it.
        """
        may_be_stopped = self.state.recipe.checkpoint.interval or "SLURM_JOB_ID" in os.environ
        if self.state.accelerator.num_processes > 1 and may_be_stopped:
            self.save()

    def restore_best_weights(self) -> None:
        """Give the model its best weights after the training, with ``checkpoint.keep_best``. Collective.

        Raises:
            CheckpointError: they are missing or damaged.
        """
        if self.best_weights is not None:
            self.best_weights.restore()

    def save(self) -> None:
        """Save a checkpoint of the last step, unless it is saved already. Collective.

        Raises:
            OutputError: it cannot be written.
        """
        state, step = self.state, self.state.progress.completed_steps
        if self.last_saved_step == step:
            return
        breakdown = state.build_memory_breakdown()
        to_save = capture_state(state.accelerator, self.training, self.adapted_model.model, state.progress)
        with state.probe.exclude_memory():
            to_save |= {
                "probe": state.probe.state_dict(),
                "resumed_after": state.resumed_after,
                INITIAL_VALUES_KEY: getattr(self.adapted_model.model, "initial_values", None),
                "held_out_curve": state.held_out_curve.model_dump() if state.held_out_curve else None,
                "measurements": {
                    "counted_flops": state.get_counted_flops(),
                    "memory_breakdown": breakdown.model_dump() if breakdown else None,
                },
            }
            start = time.perf_counter()
            self.checkpoint_manager.save(step, to_save)
            self.save_seconds = time.perf_counter() - start
        self.last_saved_step = step

    def _delete_unused_weights(self) -> None:
        """Delete best weights of an earlier process that this one does not restore."""
        if self.best_weights is not None:
            self.best_weights.delete_unused(self.state.held_out_curve)

    def delete_all(self) -> None:
        """Delete all checkpoints and best weights of this training, since its record is written."""
        self.checkpoint_manager.delete_all()
        if self.best_weights is not None:
            self.best_weights.delete_all()
        shutil.rmtree(self.state.run_dir.offload_dir, ignore_errors=True)

    def _check_time_limit(self, step: int) -> None:
        """Check, after the first steps, that a step and its checkpoint fit between stop request and time limit.

        Raises:
            TimeLimitError: they do not; raised on all ranks.
        """
        lead, steps_done = os.environ.get(STOP_LEAD_ENV), step - self.resume_step
        if lead is None:
            return
        if steps_done == 2:  # early, so that even a short job makes progress; it also measures the save time
            self.save()
        points = self.state.held_out_curve.points if self.state.held_out_curve is not None else ()
        evaluation_seconds = [point.seconds for point in points if point.step > self.resume_step]
        is_first_evaluation = len(evaluation_seconds) == 1 and points[-1].step == step
        # The first steps are slower than all others: kernels are compiled, instruments are active.
        first_checked_step = max(2, self.state.recipe.profile.untimed_steps + 1)
        if steps_done != first_checked_step and not (steps_done > first_checked_step and is_first_evaluation):
            return
        step_seconds = min(self.state.probe.step_seconds[-2:])
        others = f" and its checkpoint {self.save_seconds:.1f} s"
        if evaluation_seconds:
            others = f", its evaluation {max(evaluation_seconds):.1f} s{others}"
        own_seconds = step_seconds + max(evaluation_seconds, default=0.0) + self.save_seconds
        seconds = max(all_gather_objects(self.state.accelerator, own_seconds))
        if seconds > float(lead):
            raise TimeLimitError(
                f"a step takes {step_seconds:.1f} s{others}, but the job receives its stop signal only {lead} s before "
                "the time limit",
                f"send it earlier, e.g. slurm.signal=B:USR1@{2 * math.ceil(seconds)}",
            )

    def _reduce_stop_reason(self) -> str | None:
        """Return why any rank was requested to stop, None on all ranks if none was. Collective."""
        reason, accelerator = self.shutdown_signal.reason, self.state.accelerator
        if accelerator.num_processes == 1:
            return reason
        num_requests: Any = accelerator.reduce(torch.tensor(float(reason is not None), device=accelerator.device))
        return (reason or "another process") if float(num_requests) else None


def build_checkpoint_manager(state: RunState, adapted_model: AdaptedModel) -> CheckpointManager:
    """Return the manager of this run's training checkpoints."""
    metadata, keep_latest = _build_metadata(state, adapted_model), state.recipe.checkpoint.keep_latest
    return CheckpointManager(state.accelerator, state.run_dir.path, metadata, keep_latest)


def _build_metadata(state: RunState, adapted_model: AdaptedModel) -> CheckpointMetadata:
    data_libraries = {"datasets", "evaluate"}  # their versions change no training state
    versions = {
        name: version
        for name, version in get_library_versions(OPTIMIZER_LIBRARIES).items()
        if name not in data_libraries
    }
    base = adapted_model.base
    return CheckpointMetadata(
        state.requested_recipe.fingerprint_training(),
        state.requested_recipe.fingerprint_measured_training(),
        " ".join(filter(None, (base.fingerprint, base.config_fingerprint))),
        str(state.training_data_fingerprint),
        state.engine.name,
        state.accelerator.num_processes,
        state.accelerator.device.type,
        versions,
    )
