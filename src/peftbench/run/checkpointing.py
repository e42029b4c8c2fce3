"""Lets a training be stopped and gone on with: keeps its state between steps, takes it up, ends it when asked to."""

from __future__ import annotations

import math
import os
import shutil
import time
from typing import TYPE_CHECKING, Any

import torch

from peftbench.distributed.collectives import all_gather_objects
from peftbench.errors import CheckpointError, TimeLimitError
from peftbench.run.record_builder import build_memory_breakdown, get_library_versions
from peftbench.run.shutdown import StopRequested
from peftbench.run_dir.layout import OFFLOAD_DIR
from peftbench.run_dir.stop_request import STOP_LEAD_ENV
from peftbench.training.checkpoint import CheckpointManager, CheckpointMetadata
from peftbench.training.state import capture_state, load_state

if TYPE_CHECKING:
    from peftbench.run.runner import Run
    from peftbench.training.build import AdaptedModel, TrainingComponents


class TrainingCheckpointer:
    """Of one run, from when its model is built."""

    def __init__(self, run: Run, adapted_model: AdaptedModel) -> None:
        self.run, self.adapted_model = run, adapted_model
        origin = CheckpointMetadata(
            run.requested_recipe.fingerprint(),
            str(adapted_model.base.fingerprint),
            str(run.data_fingerprint),
            run.engine.name,
            run.accelerator.num_processes,
            run.accelerator.device.type,
            {name: version for name, version in get_library_versions().items() if name not in {"datasets", "evaluate"}},
        )
        self.checkpoint_manager = CheckpointManager(
            run.accelerator, run.run_dir, origin, run.recipe.checkpoint.keep_latest
        )
        self.resume_step = 0
        """Steps that were there when this process began."""
        self.last_saved_step: int | None = None
        """Steps in the newest checkpoint, None where there is none."""
        self.save_seconds = 0.0
        """What the last one took to write."""

    def maybe_resume(self, training: TrainingComponents) -> None:
        """Go on from the newest checkpoint of this very run, where there is one.

        Raises:
            CheckpointError: it cannot be.
        """
        run, accelerator = self.run, self.run.accelerator
        found = self.checkpoint_manager.latest()
        run.notes += self.checkpoint_manager.notes
        if found is None:
            return
        state, own = self.checkpoint_manager.load(found)
        problem = None
        try:
            load_state(state, accelerator, training, self.adapted_model.model, run.progress, restore_rng_state=own)
        except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            problem = f"{found.path} does not fit: {error}"
        if problems := [said for said in all_gather_objects(accelerator, problem) if said is not None]:
            raise CheckpointError(problems[0], f"remove {found.path.parent} to begin anew")
        run.probe.load_state_dict(state["probe"], same_world_size=own)
        run.resumed_measurements = state["measurements"] if own else {}
        self.resume_step = self.last_saved_step = run.progress.completed_steps
        run.resumed_after = [*state["resumed_after"], self.resume_step]
        if not own:
            run.notes.append(
                f"its first {self.resume_step} steps were made by {found.metadata.world_size} processes, and are in no "
                "figure of speed, memory or energy"
            )
        run.notes.append(f"it was stopped and went on after step {self.resume_step}")

    def after_step(self, step: int, training: TrainingComponents) -> None:
        """Keep the state where that is due.

        Raises:
            Interrupted: a rank was asked to stop; the state is kept.
        """
        by, every = self._reduce_stop_reason(), self.run.recipe.checkpoint.interval
        if by is not None or (every and step % every == 0):
            self.save(training)
        if by is not None:
            raise StopRequested(by, on_all_ranks=True)
        self._check_time_limit(step, training)

    def save_before_evaluation(self, training: TrainingComponents) -> None:
        """Keep the state before the evaluation, where many could not agree to do so in the middle of one."""
        wanted = self.run.recipe.checkpoint.interval or "SLURM_JOB_ID" in os.environ
        if self.run.accelerator.num_processes > 1 and wanted:
            self.save(training)

    def save(self, training: TrainingComponents) -> None:
        """Write a checkpoint of the last step, if there is none.

        Raises:
            OutputError: it cannot be written.
        """
        run, step = self.run, self.run.progress.completed_steps
        if self.last_saved_step == step:
            return
        looked, found = run.instruments, build_memory_breakdown(run)
        counted = (
            looked.flop_counter.total_flops
            if looked and looked.flop_counter
            else run.resumed_measurements.get("counted")
        )
        state = capture_state(run.accelerator, training, self.adapted_model.model, run.progress)
        with run.probe.exclude_memory():
            state |= {
                "probe": run.probe.state_dict(),
                "resumed_after": run.resumed_after,
                "measurements": {"counted": counted, "breakdown": found.model_dump() if found else None},
            }
            start = time.perf_counter()
            self.checkpoint_manager.save(step, state)
            self.save_seconds = time.perf_counter() - start
        self.last_saved_step = step

    def delete_all(self) -> None:
        """Take all checkpoints away: the run has its result."""
        if self.run.recipe.method.is_trainable:
            self.checkpoint_manager.delete_all()
            shutil.rmtree(self.run.run_dir / OFFLOAD_DIR, ignore_errors=True)

    def _check_time_limit(self, step: int, training: TrainingComponents) -> None:
        """Whether a job that is told to stop so long before its end can finish a step and keep it until then.

        Raises:
            TimeLimitError: it cannot; on all ranks.
        """
        lead, done = os.environ.get(STOP_LEAD_ENV), step - self.resume_step
        if lead is None:
            return
        if done == 2:  # early, so that even a short time gains something; how long it takes is known then
            self.save(training)
        # The first steps are slower than all others: kernels are compiled, instruments look.
        if done != max(2, self.run.recipe.profile.untimed_steps + 1):
            return
        last = min(self.run.probe.step_seconds[-2:])
        seconds = max(all_gather_objects(self.run.accelerator, last + self.save_seconds))
        if seconds > float(lead):
            raise TimeLimitError(
                f"a step takes {last:.1f} s and its checkpoint {self.save_seconds:.1f} s, and the job is told to stop "
                f"{lead} s before its end; tell it sooner, as slurm.signal=B:USR1@{2 * math.ceil(seconds)}"
            )

    def _reduce_stop_reason(self) -> str | None:
        """What asked any of the ranks to stop; all have the same answer."""
        by, accelerator = self.run.shutdown_signal.reason, self.run.accelerator
        if accelerator.num_processes == 1:
            return by
        asked: Any = accelerator.reduce(torch.tensor(float(by is not None), device=accelerator.device))
        return (by or "another process") if float(asked) else None
