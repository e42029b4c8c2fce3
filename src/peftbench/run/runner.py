"""Run: one run from recipe to record."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peftbench.common.filesystem import write_error
from peftbench.distributed.accelerator import build_accelerator, collect_environment_warnings, verify_equal_recipes
from peftbench.distributed.collectives import broadcast_from_main, main_process_first
from peftbench.distributed.deepspeed import unwrap_optimizer
from peftbench.distributed.memory_owners import collect_engine_buffers
from peftbench.distributed.rank_failure import FailureChannel
from peftbench.errors import DataError, OutputError, PeftbenchError
from peftbench.evaluation.general_text import read_general_text
from peftbench.evaluation.metrics.selection import check_metrics, generates_text
from peftbench.profiler.energy import build_energy_meter
from peftbench.profiler.instruments import StepInstruments, build_instruments
from peftbench.profiler.probe import Probe
from peftbench.profiler.throughput import explain_untimed_run
from peftbench.record import RecordedPlan, RunRecord
from peftbench.run.checkpointing import TrainingCheckpointer
from peftbench.run.forgetting import measure_loss_before
from peftbench.run.initialization import initialize_model
from peftbench.run.interval_evaluation import EarlyStoppingCallback, IntervalEvaluation, describe_early_stop
from peftbench.run.oom import OomHandler, resolve_auto_micro_batch
from peftbench.run.outcome import OutcomeHandler
from peftbench.run.progress_bar import ProgressBar
from peftbench.run.shutdown import ShutdownSignal
from peftbench.run.stages import (
    adapt_model,
    build_interval_evaluator,
    build_training_components,
    compare_splits,
    evaluate_model,
    evaluate_without_model,
    load_examples,
    measure_training,
)
from peftbench.run.state import RunState
from peftbench.run.step_callbacks import StatusCallback
from peftbench.run.trackers import Trackers
from peftbench.run.trained_model import (
    check_disk_space,
    delete_saved_model,
    find_model_to_evaluate,
    find_unevaluated_model,
    load_trained_base,
    save_model,
)
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.lock import Lock
from peftbench.run_dir.refusal import delete_refusal
from peftbench.run_dir.status import StatusWriter
from peftbench.run_dir.stop_request import clear_stop_files, get_stop_file
from peftbench.training.auto_settings import resolve_for_launch, resolve_task
from peftbench.training.build import load_base_model
from peftbench.training.data import build_encoder, check_splits, fingerprint_training_data
from peftbench.training.loop import train
from peftbench.training.recipe_trial import check_method

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.data.batches import EncodedExamples
    from peftbench.data.encode import Encoder
    from peftbench.evaluation.evaluator import Evaluator
    from peftbench.recipe.schema import Recipe
    from peftbench.training.build import AdaptedModel, TrainingComponents
    from peftbench.training.callbacks import EvaluationCallback, StepCallback


class Run:
    """One run: owns the folder's lock and the accelerator, and calls the stages in order."""

    def __init__(
        self,
        recipe: Recipe,
        shutdown_signal: ShutdownSignal | None = None,
        step_callbacks: Sequence[StepCallback] = (),
        *,
        evaluate_only: bool = False,
        planner: Callable[[RunState], RecordedPlan] | None = None,
    ) -> None:
        """Acquire the folder and start the engine. ``step_callbacks`` are called after all others.

        With ``evaluate_only`` the run trains nothing and evaluates the saved model of the recipe's training.
        ``planner`` predicts the memory of the finished training, for the record.

        Raises:
            PeftbenchError: the recipe, the launch or the folder does not allow this run; nothing was written.
        """
        self.shutdown_signal = shutdown_signal or ShutdownSignal()
        self.step_callbacks, self.evaluate_only, self.planner = step_callbacks, evaluate_only, planner
        recipe, task_notes = resolve_task(recipe)
        check_metrics(recipe)
        check_splits(recipe, evaluate_only=evaluate_only)
        if recipe.evaluate.general_text is not None and recipe.method.needs_model:
            read_general_text(recipe.evaluate.general_text)
        recipe, resolution_notes = resolve_for_launch(recipe)
        resolution_notes = [*task_notes, *resolution_notes]
        resolved_recipe, micro_batch_note = resolve_auto_micro_batch(recipe)
        self.run_dir = RunDir.from_recipe(recipe)
        self._created_dirs = _create_run_dir(self.run_dir.path)
        self.lock = Lock(self.run_dir.path)
        try:
            context = build_accelerator(resolved_recipe, self.run_dir.path)
            verify_equal_recipes(context.accelerator, resolved_recipe)
            broadcast_from_main(context.accelerator, self._acquire_lock)
        except BaseException:
            self._remove_created_dirs()
            raise
        accelerator = self.accelerator = context.accelerator
        device = accelerator.device
        self.shutdown_signal.defer()  # the folder shows this run: from now on a stop ends it with a record
        self.status_writer = StatusWriter(self.run_dir.path, enabled=accelerator.is_main_process)
        self.status_writer.set_phase("starting")
        self.oom_handler = OomHandler(resolved_recipe, device, self.run_dir.path, accelerator.process_index)
        self.failure_channel = FailureChannel(accelerator, self.run_dir.path)
        probe = Probe(device, build_energy_meter(device, reads_cpu_counters=accelerator.is_local_main_process))
        probe.on_phase = self.status_writer.set_phase
        resolution_notes += [micro_batch_note] if micro_batch_note is not None else []
        notes = [*collect_environment_warnings(accelerator), *resolution_notes]
        self.state = RunState(recipe, resolved_recipe, self.run_dir, context, probe, notes)
        self.outcome_handler = OutcomeHandler(self.state, self.oom_handler, self.failure_channel, self.shutdown_signal)

    @property
    def record_path(self) -> Path | None:
        """Path of the record, None before this process has written it."""
        return self.outcome_handler.record_path

    def abort_on_rank_failure(self) -> None:
        """From now on, end this process when another rank fails."""
        self.failure_channel.watch(self.outcome_handler.abort)

    def execute(self) -> tuple[RunRecord, Path]:
        """Run all stages and write the record; return it and its path.

        Raises:
            PeftbenchError: the recipe cannot be run and nothing was written; or, once steps were trained, their result
                cannot be saved, and a record with outcome ``failed`` was written.
            Exception: a bug; a record with outcome ``failed`` was written.
        """
        try:
            record, path = self.outcome_handler.run_to_record(self.run_stages)
            return self._add_plan(record), path
        except PeftbenchError:
            if self.record_path is None:
                self.status_writer.delete()
            if self.accelerator.is_main_process:
                self.failure_channel.mark_record_written()
            self._remove_created_dirs()
            raise
        finally:
            if self.accelerator.is_main_process:
                clear_stop_files(*self._stop_files)
            self.lock.release()

    def _add_plan(self, record: RunRecord) -> RunRecord:
        """Return the record with the plan of a finished training, and write it again.

        The record was written before: no measurement depends on the plan, and none is lost if the process is killed.
        """
        if self.planner is None or self.record_path is None or record.outcome.kind != "ok" or not self.state.is_trained:
            return record
        self.oom_handler.release_limit()  # the plan is not part of the run
        record = record.model_copy(update={"plan": self.planner(self.state)})
        with contextlib.suppress(OutputError):  # the record without a plan stays
            record.write(self.run_dir.path)
        return record

    def run_stages(self) -> None:
        """Run all stages in order; a benchmark may override it with fewer."""
        state, recipe, probe = self.state, self.state.recipe, self.state.probe
        self.shutdown_signal.watch_files(*self._stop_files)
        # Before any work: later the Hub may be unreachable, or the files may have changed.
        state.data_fingerprint = main_process_first(self.accelerator, recipe.data.source.fingerprint)
        self.oom_handler.enforce_budget(probe.memory_meter)
        if not recipe.method.needs_model:
            with probe.phase("generate"):
                evaluate_without_model(state)
            delete_saved_model(state)
            return
        trained_dir = self._find_trained_model()
        if recipe.method.needs_trial:
            with probe.phase("try"):
                check_method(recipe, self.accelerator.device, generates_text=generates_text(recipe))
        with probe.phase("load"):
            base_model = load_base_model(recipe) if trained_dir is None else load_trained_base(state, trained_dir)
        with probe.phase("build"):
            encoder = build_encoder(recipe, base_model)
            held_out = load_examples(state, encoder, recipe.evaluate.split)
            state.stop_ids = encoder.find_stop_ids(held_out[0]) if recipe.task.evaluation == "generate" else []
            adapted_model = adapt_model(state, base_model)
            if trained_dir is not None:
                if recipe.method.keeps_base_frozen:  # else the trained weights are loaded already
                    measure_loss_before(state, adapted_model, encoder, self.oom_handler.is_oom)
                recipe.method.load(adapted_model.model, trained_dir)
                self._compare_with_training_split(encoder, held_out)
        self.shutdown_signal.raise_if_requested()
        if recipe.method.is_trainable and trained_dir is None:
            if recipe.save_model:
                broadcast_from_main(self.accelerator, lambda: check_disk_space(state, adapted_model))
            with probe.phase("build"):
                examples = load_examples(state, encoder, "train")
                compare_splits(state, examples, held_out)
            adapted_model = initialize_model(
                state, adapted_model, examples, encoder.eos_token_id, self.shutdown_signal.raise_if_requested
            )
            with probe.phase("build"):
                evaluator = build_interval_evaluator(state, adapted_model, encoder, held_out, self.oom_handler.is_oom)
            self.train(adapted_model, examples, encoder.eos_token_id, encoder=encoder, interval_evaluator=evaluator)
            state.notes += recipe.method.list_training_notes(adapted_model.model)
            if recipe.save_model:
                with probe.phase("save"):
                    save_model(state, adapted_model)
            measure_training(state)
            if recipe.save_model:
                self.outcome_handler.write_training_record()
        evaluate_model(state, adapted_model, encoder, held_out, self.oom_handler.is_oom)
        state.gather_rank_measurements()
        if not state.has_saved_model:
            delete_saved_model(state)

    def _compare_with_training_split(self, encoder: Encoder, held_out: Dataset) -> None:
        """Count examples that are also training examples; without the training split, note that it is unknown."""
        state = self.state
        try:
            examples = load_examples(state, encoder, "train")
        except DataError as error:
            state.notes.append(f"examples shared with the training split are unknown: {error}")
            return
        compare_splits(state, examples, held_out)

    def _find_trained_model(self) -> Path | None:
        """Return the folder of the saved model if this recipe's training is finished and only its evaluation is not.

        Raises:
            RecordError: the run is to evaluate a saved model, and there is none of this recipe.
        """
        state = self.state
        if not state.recipe.method.is_trainable:
            return None
        state.training_data_fingerprint = main_process_first(
            self.accelerator, lambda: fingerprint_training_data(state.recipe)
        )
        find = find_model_to_evaluate if self.evaluate_only else find_unevaluated_model
        state.trained_record = broadcast_from_main(self.accelerator, lambda: find(state))
        if state.trained_record is None:
            return None
        state.has_saved_model = True
        if self.accelerator.is_main_process and not self.evaluate_only:
            sys.stderr.write("note: the training is already finished; only its saved model is evaluated\n")
        return self.run_dir.model_dir

    def train(
        self,
        adapted_model: AdaptedModel,
        examples: EncodedExamples,
        pad_token_id: int,
        *,
        encoder: Encoder | None = None,
        interval_evaluator: Evaluator | None = None,
    ) -> None:
        """Train, from the newest checkpoint if there is one; evaluate during training with ``interval_evaluator``.

        ``encoder`` encodes the general text of ``evaluate.general_text``.
        """
        state, recipe = self.state, self.state.recipe
        with state.probe.phase("build"):
            training = build_training_components(state, adapted_model, examples, pad_token_id)
        if encoder is not None:
            measure_loss_before(state, adapted_model, encoder, self.oom_handler.is_oom)
        if note := explain_untimed_run(recipe.profile.untimed_steps, training.total_steps):
            state.notes.append(note)
            if self.accelerator.is_main_process and recipe.train.steps is None:  # else printed before the run
                sys.stderr.write(f"note: {note}\n")
        recipe.method.set_training(adapted_model.model)
        checkpointer = TrainingCheckpointer(state, adapted_model, training, self.shutdown_signal)
        self.outcome_handler.checkpointer = checkpointer
        self.shutdown_signal.raise_if_requested()
        checkpointer.maybe_resume()
        self._set_start_status(training)
        trackers = state.trackers = Trackers(
            recipe, state.run_dir.path, state.notes, is_main=self.accelerator.is_main_process
        )
        instruments = state.instruments = self._build_instruments(adapted_model, training)
        with (
            self.shutdown_signal.defer_to_step_end(),
            training.loss.attention_context(),
            self._create_progress_bar(training) as progress_bar,
            state.probe.training(recipe.profile.untimed_steps, instruments.get_step_context),
        ):
            train(
                self.accelerator,
                training,
                state.probe,
                state.progress,
                max_grad_norm=recipe.train.max_grad_norm,
                callbacks=[
                    trackers,
                    progress_bar,
                    StatusCallback(self.status_writer),
                    *self._build_interval_evaluations(interval_evaluator, checkpointer, [trackers, progress_bar]),
                    checkpointer,
                    *self.step_callbacks,
                ],
            )
            checkpointer.save_before_evaluation()
        if state.progress.stopped_early:
            state.notes.append(describe_early_stop(recipe.early_stopping, state.progress, training.total_steps))
        recipe.optimizer.set_evaluation(unwrap_optimizer(training.optimizer))
        checkpointer.restore_best_weights()
        if training.feature_store is not None and self.accelerator.is_main_process:
            training.feature_store.mark_durable()

    def _build_interval_evaluations(
        self,
        evaluator: Evaluator | None,
        checkpointer: TrainingCheckpointer,
        callbacks: Sequence[EvaluationCallback],
    ) -> list[IntervalEvaluation]:
        """Return the step callback that evaluates during training; none without ``evaluate.interval``."""
        state = self.state
        if evaluator is None:
            return []
        interval_steps = state.recipe.evaluate.count_interval_steps(
            state.num_examples["train"], state.recipe.train.global_batch_size
        )
        assert interval_steps is not None
        best_weights = [checkpointer.best_weights] if checkpointer.best_weights is not None else []
        return [
            IntervalEvaluation(
                state, evaluator, interval_steps, [*callbacks, *best_weights, EarlyStoppingCallback(state)]
            )
        ]

    def _set_start_status(self, training: TrainingComponents) -> None:
        progress = self.state.progress
        self.status_writer.start_training(
            progress.completed_steps,
            training.total_steps,
            loss=next(reversed(progress.losses), None),
            read_memory_bytes=partial(self.oom_handler.held_bytes, self.state.probe.memory_meter),
            budget_bytes=self.oom_handler.budget_bytes,
        )

    def _create_progress_bar(self, training: TrainingComponents) -> ProgressBar:
        return ProgressBar(
            self.state.recipe.name,
            self.state.progress.completed_steps,
            training.total_steps,
            read_memory_bytes=partial(self.oom_handler.held_bytes, self.state.probe.memory_meter),
            budget_bytes=self.oom_handler.budget_bytes,
            enabled=self.accelerator.is_main_process,
        )

    def _build_instruments(self, adapted_model: AdaptedModel, training: TrainingComponents) -> StepInstruments:
        """Return the instruments of the untimed steps. A resumed training has used them already."""
        state, profile, is_resumed = self.state, self.state.recipe.profile, bool(self.state.resumed_after)
        return build_instruments(
            adapted_model.model,
            training.optimizer,
            device=self.accelerator.device,
            vocab_size=adapted_model.base.model.config.vocab_size,
            get_step_part=lambda: state.probe.current_step_part,
            count_flops=training.flop_counter_complete and profile.untimed_steps > 0 and not is_resumed,
            memory_breakdown_step=profile.untimed_steps if profile.memory_breakdown and not is_resumed else None,
            gradient_checkpointing=adapted_model.gradient_checkpointing,
            get_engine_buffers=lambda: collect_engine_buffers(training.model, adapted_model.model, training.optimizer),
            list_method_tensors=training.method_hooks.list_state_tensors,
        )

    @property
    def _stop_files(self) -> list[Path]:
        """Files that request a stop: one for any attempt, one for this attempt."""
        return [get_stop_file(self.run_dir.path, {}), get_stop_file(self.run_dir.path)]

    def _acquire_lock(self) -> None:
        self.lock.acquire()
        delete_refusal(self.run_dir.path)
        # A stop file without an attempt's name was meant for an earlier run.
        clear_stop_files(get_stop_file(self.run_dir.path, {}))

    def _remove_created_dirs(self) -> None:
        """Remove the folders created for a run that was refused, if they are empty."""
        self.lock.release()
        for directory in self._created_dirs:
            with contextlib.suppress(OSError):
                directory.rmdir()


def _create_run_dir(run_dir: Path) -> list[Path]:
    """Create the run's folder and check that it is writable; return the folders created, innermost first.

    Raises:
        OutputError: it cannot be created or written to.
    """
    try:
        created = [directory for directory in (run_dir, *run_dir.parents) if not directory.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise write_error(run_dir, error) from error
    return created
