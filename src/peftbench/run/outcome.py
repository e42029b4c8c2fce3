"""Outcome of a run: from an exception, a signal or another rank's failure to an outcome, a record and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench.errors import OutputError, PeftbenchError, RecordError
from peftbench.profiler.memory import max_over_ranks
from peftbench.record import EXIT_CODES, Memory, Outcome, RunRecord, read_record
from peftbench.run.rank_measurements import RankMeasurements
from peftbench.run.record_builder import build_record
from peftbench.run.result_line import build_result_line, exit_immediately, is_main_process, print_result_line
from peftbench.run.shutdown import StopRequested
from peftbench.training.loop import DivergedError

if TYPE_CHECKING:
    from peftbench.distributed.rank_failure import FailureChannel
    from peftbench.run.checkpointing import TrainingCheckpointer
    from peftbench.run.oom import OomHandler
    from peftbench.run.shutdown import ShutdownSignal
    from peftbench.run.state import RunState


_GONE_SECONDS = 2.0
"""Time after an error of communication in which a process that caused it is found to be gone."""
UNEVALUATED = "the training is finished, but its evaluation is not"
"""Error of a record that is written before the evaluation: it stays if the process is killed."""


class OutcomeHandler:
    """Ends one run on one rank: decides the outcome, reports it to the other ranks, writes the record."""

    def __init__(
        self, state: RunState, oom_handler: OomHandler, failure_channel: FailureChannel, shutdown_signal: ShutdownSignal
    ) -> None:
        self.state, self.oom_handler = state, oom_handler
        self.failure_channel, self.shutdown_signal = failure_channel, shutdown_signal
        self.checkpointer: TrainingCheckpointer | None = None
        """Set when training starts."""
        self.record_path: Path | None = None
        """Path of the record, set once it is written; stays None on all ranks but the main process."""

    def run_to_record(self, run_stages: Callable[[], None]) -> tuple[RunRecord, Path]:
        """Call ``run_stages`` and write the record, whatever the outcome; return the record and its path.

        Raises:
            PeftbenchError: before the first step, without a record; later, after a record with outcome ``failed``.
            Exception: a bug; after a record with outcome ``failed``.
        """
        error: Exception | None = None
        try:
            outcome = self._run_to_outcome(run_stages)
        except PeftbenchError as raised:
            if not self.state.progress.completed_steps and self.state.quality is None:
                self._report_to_other_ranks(self._build_failed_outcome(str(raised)))
                raise
            # E.g. a disk that is full when the model is saved must not discard hours of measurements.
            outcome, error = self._build_failed_outcome(str(raised)), raised
        except Exception as raised:
            outcome, error = self._build_failed_outcome(f"{type(raised).__name__}: {raised}"), raised
        if error is not None:
            with suppress(PeftbenchError):  # the first error matters more
                self._save_trained_state()
        self.shutdown_signal.defer()
        self.failure_channel.acquire_exit()
        if error is not None:
            failure = self.failure_channel.read_failure() or self.failure_channel.find_gone_process(_GONE_SECONDS)
            if failure is not None:  # the failed rank caused this error
                outcome, error = self._load_outcome_of_rank(failure), None
            else:
                self._report_to_other_ranks(outcome)
        record, path = self._write_record(outcome)
        if error is not None:
            raise error
        record = self._end_trackers(record)
        if not self.state.accelerator.is_main_process:
            self.failure_channel.wait_for_record()
        return record, path

    def abort(self, failure: dict[str, Any]) -> None:
        """End this process with another rank's failure, from a thread: the main thread may be blocked in a collective.

        Does not return.
        """
        exit_code, name = EXIT_CODES[failure["outcome"]["kind"]], self.state.recipe.name
        try:
            if is_main_process():
                record, path = self._record_failure(failure)
                print(f"error: {record.outcome.error}", file=sys.stderr, flush=True)
                print_result_line(build_result_line(name, record.outcome, path), sys.__stdout__)
            else:
                print(f"error: {failure['outcome']['error']}", file=sys.stderr, flush=True)
                self.failure_channel.wait_for_record()
        except PeftbenchError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            print_result_line({"outcome": "failed", "name": name, "error": str(error)}, sys.__stdout__)
            exit_code = error.exit_code
        except BaseException as error:  # the process must end in any case, since other ranks wait for it
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}"
            print_result_line({"outcome": "failed", "name": name, "error": message}, sys.__stdout__)
            exit_code = EXIT_CODES["failed"]
        finally:
            exit_immediately(exit_code)

    def _run_to_outcome(self, run_stages: Callable[[], None]) -> Outcome:
        """Return the outcome of a run that succeeded, diverged, ran out of memory or was stopped; raise otherwise."""
        try:
            self.shutdown_signal.resume()
            run_stages()
            self.shutdown_signal.defer()
        except DivergedError as error:
            self.shutdown_signal.defer()
            # Outside of a phase, the held-out loss after the evaluation was not finite.
            phase = self.state.probe.current_phase or "evaluate"
            return Outcome(kind="diverged", step=error.step, phase=phase, error=str(error))
        except (RuntimeError, MemoryError, OSError) as error:
            if not self.oom_handler.is_oom(error):
                raise
            return self._handle_oom(error)
        except KeyboardInterrupt as error:
            return self._handle_interrupt(error)
        return Outcome(kind="ok")

    def _handle_oom(self, error: BaseException) -> Outcome:
        self.shutdown_signal.defer()
        rank = self.state.accelerator.process_index if self.failure_channel.is_distributed else None
        outcome = self.oom_handler.build_outcome(error, self.state.get_current_position(), rank)
        self._report_to_other_ranks(outcome)
        with suppress(PeftbenchError):  # the outcome matters more
            self._save_trained_state()
        return outcome

    def _handle_interrupt(self, interrupt: KeyboardInterrupt) -> Outcome:
        """Save a finished training that is not saved yet; return the outcome ``preempted``."""
        self.shutdown_signal.defer()  # a second signal is usual: one from SLURM, one that a launcher forwards
        if (failure := self.failure_channel.find_gone_process()) is not None:  # its launcher stops the other ranks
            return self._load_outcome_of_rank(failure)
        reason = interrupt.reason if isinstance(interrupt, StopRequested) else "an interrupt"
        completed_steps = self.state.progress.completed_steps
        self._save_trained_state()
        position = self.state.get_current_position()
        saved_step = self.checkpointer.last_saved_step if self.checkpointer else None
        outcome = Outcome(kind="preempted", **position, error=f"stopped by {reason}")
        if self.state.has_saved_model:
            error = f"{outcome.error}; the trained model is saved"
            outcome = Outcome(kind="preempted", **position | {"step": self.state.get_trained_steps()}, error=error)
        elif saved_step is not None and saved_step == completed_steps:
            error = f"{outcome.error}; checkpoint of step {saved_step}"
            outcome = Outcome(kind="preempted", **position | {"step": saved_step}, error=error)
        if not (isinstance(interrupt, StopRequested) and interrupt.on_all_ranks):
            self._report_to_other_ranks(outcome)
        return outcome

    def _save_trained_state(self) -> None:
        """Save a checkpoint after the last step if neither the model nor a checkpoint is saved.

        A distributed run has saved it before the evaluation, since saving is collective.
        """
        if self.state.is_trained and not self.state.has_saved_model and not self.failure_channel.is_distributed:
            assert self.checkpointer is not None
            self.checkpointer.save()

    def _build_failed_outcome(self, error: str) -> Outcome:
        return Outcome(kind="failed", **self.state.get_current_position(), error=error)

    def _report_to_other_ranks(self, outcome: Outcome) -> None:
        """Report this rank's failure, since other ranks may be blocked in a collective with it."""
        memory = {name: memory.model_dump() for name, memory in self.state.probe.memory.items()}
        self.failure_channel.report_failure({"outcome": outcome.model_dump(), "memory": memory})

    def _load_outcome_of_rank(self, failure: dict[str, Any]) -> Outcome:
        """Return the outcome that another rank reported; merge its memory peaks into this rank's."""
        peaks = {name: Memory(**memory) for name, memory in failure["memory"].items()}
        self.state.probe.memory.update(max_over_ranks([self.state.probe.memory, peaks]))
        return Outcome(**failure["outcome"])

    def _record_failure(self, failure: dict[str, Any]) -> tuple[RunRecord, Path]:
        """Write the record of a run that another rank ended."""
        self.failure_channel.acquire_exit()
        self.oom_handler.release_limit()  # writing the record needs memory too
        self.state.probe.close_open_phases()
        return self._write_record(self._load_outcome_of_rank(failure))

    def _write_record(self, outcome: Outcome) -> tuple[RunRecord, Path]:
        """Build the record, and write it on the main process."""
        state, is_main = self.state, self.state.accelerator.is_main_process
        try:
            if outcome.kind == "oom" and is_main:
                outcome = self.oom_handler.with_advice(outcome)
            if outcome.kind != "oom":
                self.oom_handler.delete_snapshot()
            record = build_record(
                state, outcome, self._get_rank_measurements(), [*state.notes, *self.oom_handler.notes]
            )
            path = state.run_dir.record_file
            if is_main and not self._keeps_existing_record(outcome):
                if not state.has_outputs:
                    state.run_dir.outputs_file.unlink(missing_ok=True)  # the record does not describe it
                path = self.record_path = record.write(state.run_dir.path)
                if outcome.kind == "ok" and self.checkpointer is not None:
                    self.checkpointer.delete_all()  # only now: a kill before the record must not cost the training
        finally:
            if is_main:
                self.failure_channel.mark_record_written()
        return record, path

    def _keeps_existing_record(self, outcome: Outcome) -> bool:
        """True if an earlier process wrote a record with results that this process does not have."""
        state = self.state
        if (trained := state.trained_record) is not None:
            return outcome.kind != "ok" and (state.quality is None or trained.outcome.kind == "ok")
        if state.progress.completed_steps or outcome.kind == "ok":
            return False
        with suppress(RecordError):
            existing = read_record(state.run_dir.record_file)
            is_same = existing.recipe_fingerprint == state.requested_recipe.fingerprint()
            return existing.steps > 0 and (is_same or outcome.kind in {"preempted", "failed"})
        return False

    def write_training_record(self) -> None:
        """Write the record of a finished training before its evaluation, which may be killed.

        It describes the saved model, so that the evaluation can be made later. All ranks' measurements are gathered.
        """
        if not self.state.accelerator.is_main_process:
            return
        self.state.run_dir.outputs_file.unlink(missing_ok=True)  # of an earlier model
        outcome = Outcome(kind="failed", phase="evaluate", error=UNEVALUATED)
        build_record(self.state, outcome, self._get_rank_measurements(), self.state.notes).write(
            self.state.run_dir.path
        )

    def _get_rank_measurements(self) -> RankMeasurements:
        """Return the gathered measurements. If a rank did not reach the end, none may wait for it in a collective."""
        if self.state.accelerator.num_processes == 1:
            self.state.gather_rank_measurements()
        return self.state.rank_measurements or RankMeasurements()

    def _end_trackers(self, record: RunRecord) -> RunRecord:
        """End the trackers; return the record, written again if one of them failed, with the note about it.

        The record is written before that, since a tracker may wait for its server.
        """
        notes = self.state.notes
        num_notes = len(notes)
        if self.state.trackers is not None:
            self.state.trackers.finish()
        if len(notes) > num_notes and self.record_path is not None:
            record = record.model_copy(update={"notes": (*record.notes, *notes[num_notes:])})
            with suppress(OutputError):  # the first one stays, and the note is on stderr
                record.write(self.state.run_dir.path)
        if (
            record.outcome.kind == "ok" or not self.failure_channel.is_distributed
        ):  # else it waits for a rank that has ended
            self.state.accelerator.end_training()
        return record


def resolve_error(error: Exception, record_path: Path | None) -> tuple[Outcome, int]:
    """Print the error that ended a run; return its outcome and exit code. ``record_path``: the record, if written.

    Raises:
        PeftbenchError: ``error``, if no record was written: the recipe was refused.
    """
    if isinstance(error, PeftbenchError):
        if record_path is None:
            raise error
        print(f"error: {error}", file=sys.stderr, flush=True)
        return Outcome(kind="failed", error=str(error)), error.exit_code
    traceback.print_exception(error)
    return Outcome(kind="failed", error=f"{type(error).__name__}: {error}"), EXIT_CODES["failed"]
