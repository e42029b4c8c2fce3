"""Lets a training be stopped and gone on with: keeps its state between steps, takes it up, ends it when asked to."""

from __future__ import annotations

import math
import os
import shutil
import time
from typing import TYPE_CHECKING, Any

import torch

from peftbench.distributed.accelerator import OFFLOAD_DIR
from peftbench.training.checkpoint import CheckpointManager, CheckpointMetadata
from peftbench.distributed.collectives import all_gather_objects
from peftbench.training.state import capture_state, load_state
from peftbench.errors import CheckpointError, TimeLimitError
from peftbench.run.record_builder import build_memory_breakdown, get_library_versions
from peftbench.run.shutdown import STOP_LEAD_ENV, StopRequested

if TYPE_CHECKING:
    from peftbench.training.build import AdaptedModel, TrainingComponents
    from peftbench.run.runner import Run


class TrainingCheckpointer:
    """Of one run, from when its model is built."""

    def __init__(self, run: Run, built: AdaptedModel) -> None:
        self.run, self.built = run, built
        origin = CheckpointMetadata(
            run.asked.fingerprint(), str(built.base.identity), str(run.data_identity), run.engine.name,
            run.accelerator.num_processes, run.accelerator.device.type,
            {name: version for name, version in get_library_versions().items() if name not in {"datasets", "evaluate"}},
        )  # fmt: skip
        self.checkpoints = CheckpointManager(run.accelerator, run.folder, origin, run.recipe.checkpoint.keep_latest)
        self.began_at = 0
        """Steps that were there when this process began."""
        self.kept_at: int | None = None
        """Steps in the newest checkpoint, None where there is none."""
        self.seconds = 0.0
        """What the last one took to write."""

    def take_up(self, trainer: TrainingComponents) -> None:
        """Go on from the newest checkpoint of this very run, where there is one.

        Raises:
            CheckpointError: it cannot be.
        """
        run, accelerator = self.run, self.run.accelerator
        found = self.checkpoints.newest()
        run.notes += self.checkpoints.notes
        if found is None:
            return
        state, own = self.checkpoints.read(found)
        problem = None
        try:
            load_state(state, accelerator, trainer, self.built.bare_model, run.progress, own_random_state=own)
        except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            problem = f"{found.path} does not fit: {error}"
        if problems := [said for said in all_gather_objects(accelerator, problem) if said is not None]:
            raise CheckpointError(problems[0], f"remove {found.path.parent} to begin anew")
        run.probe.go_on(state["probe"], same_place=own)
        run.kept = state["kept"] if own else {}
        self.began_at = self.kept_at = run.progress.steps
        run.resumed_after = [*state["resumed_after"], self.began_at]
        if not own:
            run.notes.append(
                f"its first {self.began_at} steps were made by {found.origin.processes} processes, and are in no "
                "figure of speed, memory or energy"
            )
        run.notes.append(f"it was stopped and went on after step {self.began_at}")

    def after_step(self, step: int, trainer: TrainingComponents) -> None:
        """Keep the state where that is due.

        Raises:
            Interrupted: a rank was asked to stop; the state is kept.
        """
        by, every = self._asked(), self.run.recipe.checkpoint.interval
        if by is not None or (every and step % every == 0):
            self.keep(trainer)
        if by is not None:
            raise StopRequested(by, together=True)
        self._check_time(step, trainer)

    def after_training(self, trainer: TrainingComponents) -> None:
        """Keep the state before the evaluation, where many could not agree to do so in the middle of one."""
        wanted = self.run.recipe.checkpoint.interval or "SLURM_JOB_ID" in os.environ
        if self.run.accelerator.num_processes > 1 and wanted:
            self.keep(trainer)

    def keep(self, trainer: TrainingComponents) -> None:
        """Write a checkpoint of the last step, if there is none.

        Raises:
            OutputError: it cannot be written.
        """
        run, step = self.run, self.run.progress.steps
        if self.kept_at == step:
            return
        looked, found = run.inspection, build_memory_breakdown(run)
        counted = looked.flops.total if looked and looked.flops else run.kept.get("counted")
        state = capture_state(run.accelerator, trainer, self.built.bare_model, run.progress)
        with run.probe.aside():
            state |= {
                "probe": run.probe.measured(), "resumed_after": run.resumed_after,
                "kept": {"counted": counted, "breakdown": found.model_dump() if found else None},
            }  # fmt: skip
            start = time.perf_counter()
            self.checkpoints.save(step, state)
            self.seconds = time.perf_counter() - start
        self.kept_at = step

    def forget(self) -> None:
        """Take all checkpoints away: the run has its result."""
        if self.run.recipe.method.trains:
            self.checkpoints.forget()
            shutil.rmtree(self.run.folder / OFFLOAD_DIR, ignore_errors=True)

    def _check_time(self, step: int, trainer: TrainingComponents) -> None:
        """Whether a job that is told to stop so long before its end can finish a step and keep it until then.

        Raises:
            TimeLimitError: it cannot; on all ranks.
        """
        lead, done = os.environ.get(STOP_LEAD_ENV), step - self.began_at
        if lead is None:
            return
        if done == 2:  # early, so that even a short time gains something; how long it takes is known then
            self.keep(trainer)
        # The first steps are slower than all others: kernels are compiled, instruments look.
        if done != max(2, self.run.recipe.profile.untimed_steps + 1):
            return
        last = min(self.run.probe.step_seconds[-2:])
        seconds = max(all_gather_objects(self.run.accelerator, last + self.seconds))
        if seconds > float(lead):
            raise TimeLimitError(
                f"a step takes {last:.1f} s and its checkpoint {self.seconds:.1f} s, and the job is told to stop "
                f"{lead} s before its end; tell it sooner, as slurm.signal=B:USR1@{2 * math.ceil(seconds)}"
            )

    def _asked(self) -> str | None:
        """What asked any of the ranks to stop; all have the same answer."""
        by, accelerator = self.run.stop.by, self.run.accelerator
        if accelerator.num_processes == 1:
            return by
        asked: Any = accelerator.reduce(torch.tensor(float(by is not None), device=accelerator.device))
        return (by or "another process") if float(asked) else None
