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

from peftbench.run.checkpointing import TrainingCheckpointer
from peftbench.data.docstring_corpus import DISTRIBUTION
from peftbench.distributed.accelerator import build_accelerator, collect_environment_warnings
from peftbench.training.build import AdaptedModel, TrainingComponents, apply_method, load_encoded_split, load_base_model, build_encoder, build_training, load_split
from peftbench.distributed.memory_owners import collect_engine_buffers
from peftbench.training.loop import DivergedError, TrainProgress, train
from peftbench.distributed.rank_failure import FailureChannel
from peftbench.distributed.collectives import broadcast_from_main, main_process_first
from peftbench.distributed.sharding import gather_full_model
from peftbench.errors import PeftbenchError
from peftbench.evaluation.evaluator import Evaluator, build_quality
from peftbench.common.filesystem import as_os_error, write_error
from peftbench.run.progress_bar import ProgressBar
from peftbench.run_dir.lock import Lock
from peftbench.profiler.peak_flops import measure_matmul_flops
from peftbench.profiler.energy import build_energy_meter
from peftbench.profiler.instruments import StepInstruments, build_instruments
from peftbench.profiler.memory import max_over_ranks
from peftbench.profiler.probe import Probe
from peftbench.record import RECORD_FILE, Memory, Outcome, Quality, RunRecord
from peftbench.run.record_builder import RankMeasurements, build_record
from peftbench.run.oom import OomHandler, resolve_auto_micro_batch
from peftbench.run_dir.status import StatusWriter
from peftbench.run.shutdown import StopRequested, ShutdownSignal, get_stop_file, clear_stop_files

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

    def __init__(self, recipe: Recipe, stop: ShutdownSignal | None = None) -> None:
        """``stop`` hears when it is to end; without one nothing asks it to."""
        self.stop = stop or ShutdownSignal()
        self.asked = recipe
        """As it was given, where ``recipe`` has what was settled for it."""
        self.recipe, settlement = resolve_auto_micro_batch(recipe)
        self.folder = Path(recipe.output_dir) / recipe.name
        self._made = _create_run_dir(self.folder)
        self.lock = Lock(self.folder)
        try:
            self.bound = build_accelerator(self.recipe, self.folder)
            broadcast_from_main(self.bound.accelerator, self._have_it)
        except BaseException:
            self._leave_nothing()
            raise
        self.accelerator: Accelerator = self.bound.accelerator
        self.engine = self.bound.engine
        self.teller = StatusWriter(self.folder, tells=self.accelerator.is_main_process)
        self.teller.phase("starting")
        rank, device = self.accelerator.process_index, self.accelerator.device
        self.shortage = OomHandler(self.recipe, device, self.folder, rank)
        self.peers = FailureChannel(self.accelerator, self.folder)
        self.probe = Probe(device, build_energy_meter(device, counts=self.accelerator.is_local_main_process))
        self.probe.told = self.teller.phase
        self.progress = TrainProgress()
        self.started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.built: AdaptedModel | None = None
        self.trainer: TrainingComponents | None = None
        self.continuity: TrainingCheckpointer | None = None
        self.quality: Quality | None = None
        self.examples: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.data_identity: str | None = None
        self.recorded = False
        self.inspection: StepInstruments | None = None
        self.together: RankMeasurements | None = None
        self.resumed_after: list[int] = []
        self.kept: dict[str, Any] = {}
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
            if not self.recorded:
                self.teller.forget()
            if self.accelerator.is_main_process:
                self.peers.recorded()
            self._leave_nothing()
            raise
        finally:
            if self.accelerator.is_main_process:
                clear_stop_files(*self._requests)
            self.lock.let_go()

    def _have_it(self) -> None:
        self.lock.hold()
        clear_stop_files(get_stop_file(self.folder, {}))  # which asked a run before; an attempt with a name has a file of its own

    def _execute(self) -> tuple[RunRecord, Path]:
        try:
            fault: Exception | None = None
            outcome = self._outcome()
        except PeftbenchError as error:
            if not self.progress.steps:
                raise
            # A disk that fills up with the model, say, must not cost what hours of training have measured.
            outcome, fault = Outcome(kind="failed", **self._where(), error=str(error)), error
        except Exception as error:
            outcome, fault = Outcome(kind="failed", **self._where(), error=f"{type(error).__name__}: {error}"), error
        self.stop.hold_off()
        self.peers.claim()
        if fault is not None:
            if (word := self.peers.heard()) is not None:  # it is of a rank that has gone
                outcome, fault = self._told(word), None
            else:
                self._tell(outcome)
        record, path = self._recorded(outcome)
        if fault is not None:
            raise fault
        if outcome.kind == "ok" or not self.peers.several:
            self.accelerator.end_training()
        else:  # which would wait for a rank that has gone
            for tracker in self.accelerator.trackers:
                tracker.finish()
        if not self.accelerator.is_main_process:
            self.peers.await_record()
        return record, path

    def _recorded(self, outcome: Outcome) -> tuple[RunRecord, Path]:
        """Write the record, on the main process."""
        main = self.accelerator.is_main_process
        try:
            if outcome.kind == "oom" and main:
                outcome = self.shortage.answered(outcome)
            if outcome.kind != "oom":
                self.shortage.forget()
            record, path = build_record(self, outcome), self.folder / RECORD_FILE
            if main:
                path = record.write(self.folder)
                self.recorded = True
                if outcome.kind == "ok" and self.continuity is not None:
                    self.continuity.forget()  # not sooner: what a kill takes could not be had again
        finally:
            if main:
                self.peers.recorded()
        return record, path

    def end_with(self, word: dict[str, Any]) -> tuple[Outcome, Path]:
        """End as another rank has ended, from a thread: this one may be waiting for it for ever."""
        self.peers.claim()
        self.shortage.lift()  # or there may be no memory to tell it with
        self.probe.close()
        record, path = self._recorded(self._told(word))
        return record.outcome, path

    def _told(self, word: dict[str, Any]) -> Outcome:
        """The outcome of another rank, whose peaks are kept where they are larger."""
        peaks = {name: Memory(**memory) for name, memory in word["memory"].items()}
        self.probe.memory.update(max_over_ranks([self.probe.memory, peaks]))
        return Outcome(**word["outcome"])

    def _leave_nothing(self) -> None:
        """Take back the folders made for a run that is refused, where nothing lies in them."""
        self.lock.let_go()
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _outcome(self) -> Outcome:
        try:
            self._work()
            self.stop.hold_off()
        except DivergedError as error:
            self.stop.hold_off()
            # Outside of a phase it was the evaluation that found it.
            phase = self.probe.current_phase or "evaluate"
            return Outcome(kind="diverged", step=error.step, phase=phase, error=str(error))
        except (RuntimeError, MemoryError, OSError) as error:
            if not self.shortage.is_one(error):
                raise
            return self._out_of_memory(error)
        except KeyboardInterrupt as error:
            return self._interrupted(error)
        return Outcome(kind="ok")

    def _interrupted(self, interrupt: KeyboardInterrupt) -> Outcome:
        """Keep what was trained, if it is whole: between two steps it was kept, and several ranks did so before."""
        self.stop.hold_off()  # two signals are usual: one of SLURM's, one that a launcher passes on
        by = interrupt.by if isinstance(interrupt, StopRequested) else "an interrupt"
        trained = self.trainer is not None and self.progress.steps == self.trainer.steps
        if trained and self.continuity is not None and not self.peers.several:
            assert self.trainer is not None
            self.continuity.keep(self.trainer)
        where, kept = self._where(), self.continuity.kept_at if self.continuity else None
        outcome = Outcome(kind="preempted", **where, error=f"stopped by {by}")
        if kept is not None and kept == self.progress.steps:
            error = f"{outcome.error}; step {kept} is kept"
            outcome = Outcome(kind="preempted", **where | {"step": kept}, error=error)
        if not (isinstance(interrupt, StopRequested) and interrupt.together):
            self._tell(outcome)
        return outcome

    def _out_of_memory(self, error: BaseException) -> Outcome:
        self.stop.hold_off()
        rank = self.accelerator.process_index if self.peers.several else None
        outcome = self.shortage.outcome(error, self._where(), rank)
        self._tell(outcome)
        return outcome

    def _tell(self, outcome: Outcome) -> None:
        """Tell the other ranks, which may wait for this one."""
        self.peers.tell({
            "outcome": outcome.model_dump(),
            "memory": {name: memory.model_dump() for name, memory in self.probe.memory.items()},
        })  # fmt: skip

    @property
    def _requests(self) -> list[Path]:
        """Files that ask it to stop: by anyone, and by whoever has started it."""
        return [get_stop_file(self.folder, {}), get_stop_file(self.folder)]

    def _work(self) -> None:
        self.stop.watch(*self._requests)
        # Before the work: afterwards the hub may be gone, or the files may be others.
        self.data_identity = main_process_first(self.accelerator, self.recipe.data.source.identity)
        self.shortage.prepare(self.probe.meter)
        if not self.recipe.method.needs_model:
            self._forget_model()
            with self.probe.phase("generate"):
                self.quality = self._extracted()
            return
        with self.probe.phase("load"):
            base = load_base_model(self.recipe)
        with self.probe.phase("build"):
            encoder = build_encoder(self.recipe, base)
            held_out = self._encoded(encoder, self.recipe.evaluate.split)
            built = self._build(base)
        if self.recipe.method.trains:
            with self.probe.phase("build"):
                examples = self._encoded(encoder, "train")
            self._train(built, examples, encoder.end)
        else:
            self._forget_model()
        sharded = self.engine.shards_weights and self.recipe.method.trains
        evaluation = Evaluator(self.bound, built, encoder, held_out, self.recipe, in_step=sharded)
        self.quality = evaluation.quality(self.probe)
        if not math.isfinite(self.quality.loss or 0.0):
            steps = self.progress.steps
            raise DivergedError(steps, f"the held-out loss after step {steps} is {self.quality.loss}")
        self._come_together()
        if self.recipe.method.trains and self.recipe.save_model:
            with self.probe.phase("save"):
                self._save(built)

    def _come_together(self) -> None:
        """At the end of the work, when all ranks are there: what the device can do, and what each has measured."""
        trains, device = self.recipe.method.trains, self.accelerator.device
        self.together = RankMeasurements.of(self, measure_matmul_flops(device, self.recipe.train.precision) if trains else None)

    def _build(self, base: LoadedModel) -> AdaptedModel:
        built = self.built = apply_method(self.recipe, base, self.bound)
        self.notes += built.notes
        return built

    def _encoded(self, encoder: Encoder, split: str) -> Dataset:
        found = load_encoded_split(self.recipe, encoder, split, self.accelerator)
        self._count(split, len(found.dataset), found.dropped)
        return found.dataset

    def _train(self, built: AdaptedModel, examples: EncodedExamples, pad_token: int) -> None:
        with self.probe.phase("build"):
            trainer = self.trainer = build_training(self.recipe, built, examples, pad_token, self.bound)
            self.notes += [*trainer.notes, *([trainer.uncounted] if trainer.uncounted else [])]
        self._forget_model()
        self.recipe.method.set_training(built.bare_model)
        self.continuity = TrainingCheckpointer(self, built)
        self.continuity.take_up(trainer)
        begun, loss = self.progress.steps, next(reversed(self.progress.losses), None)
        memory, budget = partial(self.shortage.held_bytes, self.probe.meter), self.shortage.budget_bytes
        self.teller.begin(begun, trainer.steps, loss=loss, memory=memory, budget_bytes=budget)
        if self.recipe.trackers:
            self.accelerator.init_trackers(DISTRIBUTION, config={"recipe": self.recipe.model_dump_json()})
        knobs = self.recipe.profile
        looking = self.inspection = build_instruments(
            built.bare_model, trainer.optimizer, device=self.accelerator.device,
            vocabulary=built.base.model.config.vocab_size, part=lambda: self.probe.current_part,
            count_flops=trainer.counter_sees_all and knobs.warmup_steps > 0 and not self.resumed_after,
            breakdown_step=knobs.warmup_steps if knobs.breakdown and not self.resumed_after else None,
            checkpointing=built.checkpointing,
            holdings=lambda: collect_engine_buffers(trainer.model, built.bare_model, trainer.optimizer),
        )  # fmt: skip
        with (
            self.stop.between_steps(), trainer.loss.in_use(),
            ProgressBar(
                self.recipe.name, begun, trainer.steps, memory=memory, budget_bytes=budget,
                shown=self.accelerator.is_main_process,
            ) as line,
            self.probe.training(knobs.warmup_steps, looking.step),
        ):  # fmt: skip
            train(
                self.accelerator, trainer, self.probe, self.progress,
                max_grad_norm=self.recipe.train.max_grad_norm,
                on_step=lambda step, values: self._after_step(step, values, trainer, line),
            )  # fmt: skip
            self.continuity.after_training(trainer)
        if trainer.store is not None and self.accelerator.is_main_process:
            trainer.store.seal()

    def _after_step(self, step: int, values: dict[str, float], trainer: TrainingComponents, line: ProgressBar) -> None:
        self.accelerator.log(values, step=step)
        line.step(values["loss"], self.progress.step_counts[-1].real)
        self.teller.step(step, trainer.steps, self.progress.step_counts[-1].real, values["loss"])
        assert self.continuity is not None
        self.continuity.after_step(step, trainer)

    def _extracted(self) -> Quality:
        """Quality of a baseline that copies its summary from the article."""
        dataset = main_process_first(self.accelerator, lambda: load_split(self.recipe, self.recipe.evaluate.split))
        self._count(self.recipe.evaluate.split, len(dataset), 0)
        texts = [self.recipe.method.extract(article) or "" for article in dataset["article"]]
        return build_quality(self.recipe.evaluate, dataset, texts)

    def _save(self, built: AdaptedModel) -> None:
        assert self.trainer is not None
        gather_full_model(self.engine, self.trainer.model, built.bare_model, here=self.accelerator.is_main_process)
        if not self.accelerator.is_main_process:
            return
        folder, unfinished = self.folder / MODEL_DIR, self.folder / f".{MODEL_DIR}.unfinished"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
            self.recipe.method.save(built.bare_model, unfinished)
            built.base.tokenizer.save_pretrained(unfinished)
            unfinished.rename(folder)
        except BaseException as error:  # a model is whole or not there, after an interrupt too
            shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(error, (OSError, SafetensorError)):
                raise write_error(folder, as_os_error(error)) from error
            raise

    def _forget_model(self) -> None:
        """Take away what an earlier run of this name left, which would not be what the new record speaks of."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder / MODEL_DIR, ignore_errors=True)

    def _count(self, split: str, examples: int, dropped: int) -> None:
        self.examples[split] = examples
        self.dropped[split] = dropped

    def _where(self) -> dict[str, Any]:
        in_training = self.probe.current_phase in {"warmup", "train"}
        step, part = (self.progress.steps + 1, self.probe.current_part) if in_training else (None, None)
        return {"phase": self.probe.current_phase, "step": step, "part": part}


def _create_run_dir(folder: Path) -> list[Path]:
    """Find out before the work that its result can be written; returns the folders made for it, innermost first."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise write_error(folder, error) from error
    return made
