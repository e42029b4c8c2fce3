"""One run, from recipe to record: preflight, build, train, evaluate, and an outcome whatever happens."""

from __future__ import annotations

import contextlib
import datetime
import math
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from peftbench.common.filesystem import as_os_error, write_error
from peftbench.data.docstring_corpus import DISTRIBUTION
from peftbench.distributed.accelerator import build_accelerator, collect_environment_warnings
from peftbench.distributed.collectives import broadcast_from_main, main_process_first
from peftbench.distributed.memory_owners import collect_engine_buffers
from peftbench.distributed.rank_failure import FailureChannel
from peftbench.distributed.sharding import gather_full_model
from peftbench.errors import PeftbenchError
from peftbench.evaluation.evaluator import Evaluator, build_quality
from peftbench.profiler.energy import build_energy_meter
from peftbench.profiler.instruments import StepInstruments, build_instruments
from peftbench.profiler.memory import max_over_ranks
from peftbench.profiler.peak_flops import measure_matmul_flops
from peftbench.profiler.probe import Probe
from peftbench.record import RECORD_FILE, Memory, Outcome, Quality, RunRecord
from peftbench.run.checkpointing import TrainingCheckpointer
from peftbench.run.oom import OomHandler, resolve_auto_micro_batch
from peftbench.run.progress_bar import ProgressBar
from peftbench.run.record_builder import RankMeasurements, build_record
from peftbench.run.shutdown import ShutdownSignal, StopRequested
from peftbench.run_dir.lock import Lock
from peftbench.run_dir.status import StatusWriter
from peftbench.run_dir.stop_request import clear_stop_files, get_stop_file
from peftbench.training.build import (
    AdaptedModel,
    TrainingComponents,
    apply_method,
    build_training,
    load_base_model,
)
from peftbench.training.data import build_encoder, load_encoded_split, load_split
from peftbench.training.loop import DivergedError, TrainProgress, train

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from peftbench.data.batches import EncodedExamples
    from peftbench.data.encode import Encoder
    from peftbench.modeling.loading import LoadedModel
    from peftbench.recipe.schema import Recipe

MODEL_DIR = "model"
"""Folder, within a run's, of what was trained."""


class Run:
    """One run. What is known is kept on it as it becomes known, so that any end leaves a full record."""

    def __init__(self, recipe: Recipe, shutdown_signal: ShutdownSignal | None = None) -> None:
        """``stop`` hears when it is to end; without one nothing asks it to."""
        self.shutdown_signal = shutdown_signal or ShutdownSignal()
        self.requested_recipe = recipe
        """As it was given, where ``recipe`` has what was settled for it."""
        self.recipe, settlement = resolve_auto_micro_batch(recipe)
        self.run_dir = Path(recipe.output_dir) / recipe.name
        self._created_dirs = _create_run_dir(self.run_dir)
        self.lock = Lock(self.run_dir)
        try:
            self.context = build_accelerator(self.recipe, self.run_dir)
            broadcast_from_main(self.context.accelerator, self._acquire_lock)
        except BaseException:
            self._remove_created_dirs()
            raise
        self.accelerator: Accelerator = self.context.accelerator
        self.engine = self.context.engine
        self.status_writer = StatusWriter(self.run_dir, enabled=self.accelerator.is_main_process)
        self.status_writer.set_phase("starting")
        rank, device = self.accelerator.process_index, self.accelerator.device
        self.oom_handler = OomHandler(self.recipe, device, self.run_dir, rank)
        self.failure_channel = FailureChannel(self.accelerator, self.run_dir)
        self.probe = Probe(
            device, build_energy_meter(device, reads_cpu_counters=self.accelerator.is_local_main_process)
        )
        self.probe.on_phase = self.status_writer.set_phase
        self.progress = TrainProgress()
        self.started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.adapted_model: AdaptedModel | None = None
        self.training: TrainingComponents | None = None
        self.checkpointer: TrainingCheckpointer | None = None
        self.quality: Quality | None = None
        self.examples: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.data_fingerprint: str | None = None
        self.is_record_written = False
        self.instruments: StepInstruments | None = None
        self.rank_measurements: RankMeasurements | None = None
        self.resumed_after: list[int] = []
        self.resumed_measurements: dict[str, Any] = {}
        """What a process before this one has found out in steps that are not done again."""
        self.notes = [*collect_environment_warnings(self.accelerator), *([settlement] if settlement else [])]

    def execute(self) -> tuple[RunRecord, Path]:
        """Run to an outcome and write the record; returns both.

        Raises:
            PeftbenchError: the recipe cannot be run and nothing was written; or, once steps were trained, what they
                gave cannot be kept, after a record with outcome ``failed`` was written.
            Exception: a fault of the program, after a record with outcome ``failed`` was written.
        """
        try:
            return self._execute()
        except PeftbenchError:
            if not self.is_record_written:
                self.status_writer.delete()
            if self.accelerator.is_main_process:
                self.failure_channel.mark_record_written()
            self._remove_created_dirs()
            raise
        finally:
            if self.accelerator.is_main_process:
                clear_stop_files(*self._stop_files)
            self.lock.release()

    def _acquire_lock(self) -> None:
        self.lock.acquire()
        clear_stop_files(
            get_stop_file(self.run_dir, {})
        )  # which asked a run before; an attempt with a name has a file of its own

    def _execute(self) -> tuple[RunRecord, Path]:
        try:
            fault: Exception | None = None
            outcome = self._run_to_outcome()
        except PeftbenchError as error:
            if not self.progress.completed_steps:
                raise
            # A disk that fills up with the model, say, must not cost what hours of training have measured.
            outcome, fault = Outcome(kind="failed", **self._current_position(), error=str(error)), error
        except Exception as error:
            outcome, fault = (
                Outcome(kind="failed", **self._current_position(), error=f"{type(error).__name__}: {error}"),
                error,
            )
        self.shutdown_signal.defer()
        self.failure_channel.acquire_exit()
        if fault is not None:
            if (word := self.failure_channel.read_failure()) is not None:  # it is of a rank that has gone
                outcome, fault = self._outcome_from_rank(word), None
            else:
                self._report_failure(outcome)
        record, path = self._write_record(outcome)
        if fault is not None:
            raise fault
        if outcome.kind == "ok" or not self.failure_channel.is_distributed:
            self.accelerator.end_training()
        else:  # which would wait for a rank that has gone
            for tracker in self.accelerator.trackers:
                tracker.finish()
        if not self.accelerator.is_main_process:
            self.failure_channel.wait_for_record()
        return record, path

    def _write_record(self, outcome: Outcome) -> tuple[RunRecord, Path]:
        """Write the record, on the main process."""
        main = self.accelerator.is_main_process
        try:
            if outcome.kind == "oom" and main:
                outcome = self.oom_handler.with_advice(outcome)
            if outcome.kind != "oom":
                self.oom_handler.delete_snapshot()
            record, path = build_record(self, outcome), self.run_dir / RECORD_FILE
            if main:
                path = record.write(self.run_dir)
                self.is_record_written = True
                if outcome.kind == "ok" and self.checkpointer is not None:
                    self.checkpointer.delete_all()  # not sooner: what a kill takes could not be had again
        finally:
            if main:
                self.failure_channel.mark_record_written()
        return record, path

    def abort_with(self, failure: dict[str, Any]) -> tuple[Outcome, Path]:
        """End as another rank has ended, from a thread: this one may be waiting for it for ever."""
        self.failure_channel.acquire_exit()
        self.oom_handler.release_limit()  # or there may be no memory to tell it with
        self.probe.close_open_phases()
        record, path = self._write_record(self._outcome_from_rank(failure))
        return record.outcome, path

    def _outcome_from_rank(self, failure: dict[str, Any]) -> Outcome:
        """The outcome of another rank, whose peaks are kept where they are larger."""
        peaks = {name: Memory(**memory) for name, memory in failure["memory"].items()}
        self.probe.memory.update(max_over_ranks([self.probe.memory, peaks]))
        return Outcome(**failure["outcome"])

    def _remove_created_dirs(self) -> None:
        """Take back the folders made for a run that is refused, where nothing lies in them."""
        self.lock.release()
        for folder in self._created_dirs:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _run_to_outcome(self) -> Outcome:
        try:
            self._run_stages()
            self.shutdown_signal.defer()
        except DivergedError as error:
            self.shutdown_signal.defer()
            # Outside of a phase it was the evaluation that found it.
            phase = self.probe.current_phase or "evaluate"
            return Outcome(kind="diverged", step=error.step, phase=phase, error=str(error))
        except (RuntimeError, MemoryError, OSError) as error:
            if not self.oom_handler.is_oom(error):
                raise
            return self._handle_oom(error)
        except KeyboardInterrupt as error:
            return self._handle_interrupt(error)
        return Outcome(kind="ok")

    def _handle_interrupt(self, interrupt: KeyboardInterrupt) -> Outcome:
        """Keep what was trained, if it is whole: between two steps it was kept, and several ranks did so before."""
        self.shutdown_signal.defer()  # two signals are usual: one of SLURM's, one that a launcher passes on
        by = interrupt.reason if isinstance(interrupt, StopRequested) else "an interrupt"
        trained = self.training is not None and self.progress.completed_steps == self.training.total_steps
        if trained and self.checkpointer is not None and not self.failure_channel.is_distributed:
            assert self.training is not None
            self.checkpointer.save(self.training)
        where, kept = self._current_position(), self.checkpointer.last_saved_step if self.checkpointer else None
        outcome = Outcome(kind="preempted", **where, error=f"stopped by {by}")
        if kept is not None and kept == self.progress.completed_steps:
            error = f"{outcome.error}; step {kept} is kept"
            outcome = Outcome(kind="preempted", **where | {"step": kept}, error=error)
        if not (isinstance(interrupt, StopRequested) and interrupt.on_all_ranks):
            self._report_failure(outcome)
        return outcome

    def _handle_oom(self, error: BaseException) -> Outcome:
        self.shutdown_signal.defer()
        rank = self.accelerator.process_index if self.failure_channel.is_distributed else None
        outcome = self.oom_handler.build_outcome(error, self._current_position(), rank)
        self._report_failure(outcome)
        return outcome

    def _report_failure(self, outcome: Outcome) -> None:
        """Tell the other ranks, which may wait for this one."""
        self.failure_channel.report_failure(
            {
                "outcome": outcome.model_dump(),
                "memory": {name: memory.model_dump() for name, memory in self.probe.memory.items()},
            }
        )

    @property
    def _stop_files(self) -> list[Path]:
        """Files that ask it to stop: by anyone, and by whoever has started it."""
        return [get_stop_file(self.run_dir, {}), get_stop_file(self.run_dir)]

    def _run_stages(self) -> None:
        self.shutdown_signal.watch_files(*self._stop_files)
        # Before the work: afterwards the hub may be gone, or the files may be others.
        self.data_fingerprint = main_process_first(self.accelerator, self.recipe.data.source.fingerprint)
        self.oom_handler.enforce_budget(self.probe.memory_meter)
        if not self.recipe.method.needs_model:
            self._delete_saved_model()
            with self.probe.phase("generate"):
                self.quality = self._evaluate_extractive_baseline()
            return
        with self.probe.phase("load"):
            base = load_base_model(self.recipe)
        with self.probe.phase("build"):
            encoder = build_encoder(self.recipe, base)
            held_out = self._load_split(encoder, self.recipe.evaluate.split)
            built = self._build_model(base)
        if self.recipe.method.is_trainable:
            with self.probe.phase("build"):
                examples = self._load_split(encoder, "train")
            self._train(built, examples, encoder.eos_token_id)
        else:
            self._delete_saved_model()
        sharded = self.engine.shards_weights and self.recipe.method.is_trainable
        evaluation = Evaluator(self.context, built, encoder, held_out, self.recipe, synced=sharded)
        self.quality = evaluation.evaluate(self.probe)
        if not math.isfinite(self.quality.loss or 0.0):
            steps = self.progress.completed_steps
            raise DivergedError(steps, f"the held-out loss after step {steps} is {self.quality.loss}")
        self._gather_measurements()
        if self.recipe.method.is_trainable and self.recipe.save_model:
            with self.probe.phase("save"):
                self._save_model(built)

    def _gather_measurements(self) -> None:
        """At the end of the work, when all ranks are there: what the device can do, and what each has measured."""
        trains, device = self.recipe.method.is_trainable, self.accelerator.device
        self.rank_measurements = RankMeasurements.gather(
            self, measure_matmul_flops(device, self.recipe.train.precision) if trains else None
        )

    def _build_model(self, base_model: LoadedModel) -> AdaptedModel:
        built = self.adapted_model = apply_method(self.recipe, base_model, self.context)
        self.notes += built.notes
        return built

    def _load_split(self, encoder: Encoder, split: str) -> Dataset:
        found = load_encoded_split(self.recipe, encoder, split, self.accelerator)
        self._set_example_counts(split, len(found.dataset), found.num_dropped)
        return found.dataset

    def _train(self, adapted_model: AdaptedModel, examples: EncodedExamples, pad_token_id: int) -> None:
        with self.probe.phase("build"):
            trainer = self.training = build_training(self.recipe, adapted_model, examples, pad_token_id, self.context)
            self.notes += [*trainer.notes, *([trainer.flops_unknown_reason] if trainer.flops_unknown_reason else [])]
        self._delete_saved_model()
        self.recipe.method.set_training(adapted_model.model)
        self.checkpointer = TrainingCheckpointer(self, adapted_model)
        self.checkpointer.maybe_resume(trainer)
        begun, loss = self.progress.completed_steps, next(reversed(self.progress.losses), None)
        memory, budget = partial(self.oom_handler.held_bytes, self.probe.memory_meter), self.oom_handler.budget_bytes
        self.status_writer.start_training(
            begun, trainer.total_steps, loss=loss, read_memory_bytes=memory, budget_bytes=budget
        )
        if self.recipe.trackers:
            self.accelerator.init_trackers(DISTRIBUTION, config={"recipe": self.recipe.model_dump_json()})
        knobs = self.recipe.profile
        looking = self.instruments = build_instruments(
            adapted_model.model,
            trainer.optimizer,
            device=self.accelerator.device,
            vocab_size=adapted_model.base.model.config.vocab_size,
            get_step_part=lambda: self.probe.current_step_part,
            count_flops=trainer.flop_counter_complete and knobs.untimed_steps > 0 and not self.resumed_after,
            memory_breakdown_step=knobs.untimed_steps if knobs.memory_breakdown and not self.resumed_after else None,
            gradient_checkpointing=adapted_model.gradient_checkpointing,
            get_engine_buffers=lambda: collect_engine_buffers(trainer.model, adapted_model.model, trainer.optimizer),
        )
        with (
            self.shutdown_signal.defer_to_step_end(),
            trainer.loss.attention_context(),
            ProgressBar(
                self.recipe.name,
                begun,
                trainer.total_steps,
                read_memory_bytes=memory,
                budget_bytes=budget,
                enabled=self.accelerator.is_main_process,
            ) as line,
            self.probe.training(knobs.untimed_steps, looking.get_step_context),
        ):
            train(
                self.accelerator,
                trainer,
                self.probe,
                self.progress,
                max_grad_norm=self.recipe.train.max_grad_norm,
                on_step=lambda step, values: self._after_step(step, values, trainer, line),
            )
            self.checkpointer.save_before_evaluation(trainer)
        if trainer.feature_store is not None and self.accelerator.is_main_process:
            trainer.feature_store.mark_durable()

    def _after_step(
        self, step: int, metrics: dict[str, float], training: TrainingComponents, progress_bar: ProgressBar
    ) -> None:
        self.accelerator.log(metrics, step=step)
        progress_bar.update(metrics["loss"], self.progress.step_token_counts[-1].real)
        self.status_writer.update_step(
            step, training.total_steps, self.progress.step_token_counts[-1].real, metrics["loss"]
        )
        assert self.checkpointer is not None
        self.checkpointer.after_step(step, training)

    def _evaluate_extractive_baseline(self) -> Quality:
        """Quality of a baseline that copies its summary from the article."""
        dataset = main_process_first(self.accelerator, lambda: load_split(self.recipe, self.recipe.evaluate.split))
        self._set_example_counts(self.recipe.evaluate.split, len(dataset), 0)
        texts = [self.recipe.method.extract_summary(article) or "" for article in dataset["article"]]
        return build_quality(self.recipe.evaluate, dataset, texts)

    def _save_model(self, adapted_model: AdaptedModel) -> None:
        assert self.training is not None
        gather_full_model(
            self.engine, self.training.model, adapted_model.model, on_this_rank=self.accelerator.is_main_process
        )
        if not self.accelerator.is_main_process:
            return
        folder, unfinished = self.run_dir / MODEL_DIR, self.run_dir / f".{MODEL_DIR}.unfinished"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
            self.recipe.method.save(adapted_model.model, unfinished)
            adapted_model.base.tokenizer.save_pretrained(unfinished)
            unfinished.rename(folder)
        except BaseException as error:  # a model is whole or not there, after an interrupt too
            shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(error, (OSError, SafetensorError)):
                raise write_error(folder, as_os_error(error)) from error
            raise

    def _delete_saved_model(self) -> None:
        """Take away what an earlier run of this name left, which would not be what the new record speaks of."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.run_dir / MODEL_DIR, ignore_errors=True)

    def _set_example_counts(self, split: str, examples: int, dropped: int) -> None:
        self.examples[split] = examples
        self.dropped[split] = dropped

    def _current_position(self) -> dict[str, Any]:
        in_training = self.probe.current_phase in {"warmup", "train"}
        step, part = (self.progress.completed_steps + 1, self.probe.current_step_part) if in_training else (None, None)
        return {"phase": self.probe.current_phase, "step": step, "part": part}


def _create_run_dir(run_dir: Path) -> list[Path]:
    """Find out before the work that its result can be written; returns the folders made for it, innermost first."""
    made = [place for place in (run_dir, *run_dir.parents) if not place.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise write_error(run_dir, error) from error
    return made
