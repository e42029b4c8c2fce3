"""The held-out loss during training: it is recorded, changes nothing, selects weights and ends trainings."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peftbench.data.sources import Files
from peftbench.errors import CheckpointError, EmptySplitError, TimeLimitError
from peftbench.evaluation.evaluator import Evaluator, HeldOutLoss
from peftbench.methods.base import Method
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.optim import AdamW, Optimizer, ScheduleFree
from peftbench.recipe.schema import Checkpoint, EarlyStopping, Recipe
from peftbench.record import RunRecord, read_record
from peftbench.run import best_weights
from peftbench.run.runner import Run
from peftbench.run_dir.layout import RunDir, get_checkpoint_step
from peftbench.run_dir.stop_request import STOP_LEAD_ENV
from peftbench.training.checkpoint import CheckpointManager
from tests.helpers.corpus import examples, write_corpus
from tests.helpers.methods import one_method_fast
from tests.helpers.short_runs import use_small_matmul
from tests.helpers.training import reset_accelerators
from tests.helpers.workshop import Workshop

LARGE_STEPS = AdamW(learning_rate=0.05)


def read_curve(record: RunRecord) -> list[tuple[int, float]]:
    """Return step and loss of each evaluation during training."""
    assert record.held_out_curve is not None
    return [(point.step, point.loss) for point in record.held_out_curve.points]


@pytest.fixture
def fake_losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Return a function that sets the losses of the next evaluations; later ones are computed."""

    def set_losses(losses: list[float]) -> None:
        remaining = iter(losses)
        compute = Evaluator.compute_held_out_loss

        def next_loss(self: Evaluator) -> HeldOutLoss:
            loss = next(remaining, None)
            return compute(self) if loss is None else HeldOutLoss((loss,), (1,))

        monkeypatch.setattr(Evaluator, "compute_held_out_loss", next_loss)

    return set_losses


@one_method_fast("last_layer", "lora")
def test_training_is_not_changed(method: Method, workshop: Workshop) -> None:
    """With dropout, losses and the evaluated model are equal to the last bit with and without evaluation."""
    model, train = {"dropout": 0.2}, {"steps": 5}
    plain = workshop.run(workshop.recipe(method, model=model, train=train))
    evaluated = workshop.run(workshop.recipe(method, model=model, train=train, evaluate={"interval": 2}))
    assert evaluated.step_losses == plain.step_losses
    assert evaluated.quality == plain.quality
    assert plain.held_out_curve is None
    assert [step for step, _ in read_curve(evaluated)] == [2, 4, 5]


def test_random_states_and_mode_are_restored(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that draws random numbers and changes the model's mode leaves the training as it is."""
    recipe = workshop.recipe(Lora(r=2, lora_dropout=0.3), model={"dropout": 0.2}, train={"steps": 4})
    plain = workshop.run(recipe)
    compute = Evaluator.compute_held_out_loss

    def draw(self: Evaluator) -> HeldOutLoss:
        torch.rand(3)
        np.random.random(3)
        random.random()  # noqa: S311
        return compute(self)

    monkeypatch.setattr(Evaluator, "compute_held_out_loss", draw)
    evaluated = workshop.run(
        workshop.recipe(recipe.method, model={"dropout": 0.2}, train={"steps": 4}, evaluate={"interval": 1})
    )
    assert evaluated.step_losses == plain.step_losses


def test_feature_cache_is_not_changed(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation neither reads nor writes the stored hidden states."""
    losses: list[tuple[float, ...]] = []
    for evaluate in ({}, {"interval": 1}):
        monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path / f"cache{len(losses)}"))
        train = {"epochs": 2, "steps": None, "feature_cache": "fp32"}
        losses.append(workshop.run(workshop.recipe(LastLayer(), train=train, evaluate=evaluate)).step_losses)
    assert losses[0] == losses[1]


def test_loss_is_that_of_an_evaluation_after_as_many_steps(workshop: Workshop) -> None:
    """The curve's points are the held-out losses of runs that end there, on the same split."""
    schedule: dict[str, Any] = {"evaluate": {"interval": 2, "split": "validation"}}
    record = workshop.run(workshop.recipe(Lora(r=2), train={"steps": 4}, optimizer=LARGE_STEPS, **schedule))
    (first, first_loss), (last, last_loss) = read_curve(record)
    assert (first, last) == (2, 4)
    assert record.quality is not None
    assert last_loss == record.quality.loss != first_loss
    assert record.held_out_curve is not None
    assert record.held_out_curve.num_examples == record.num_examples["validation"]


def test_part_of_an_epoch(workshop: Workshop) -> None:
    """An interval of half an epoch is half of the steps that an epoch has."""
    recipe = workshop.recipe(
        Lora(r=2), train={"steps": None, "epochs": 1, "global_batch_size": 6}, evaluate={"interval": "0.5ep"}
    )
    record = workshop.run(recipe)
    assert [step for step, _ in read_curve(record)] == [record.steps // 2, record.steps]


def test_clocks_and_throughput_exclude_the_evaluation(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of half a second is in no step and in no phase of the training; its point has its duration."""
    compute = Evaluator.compute_held_out_loss

    def wait(self: Evaluator) -> HeldOutLoss:
        time.sleep(0.5)
        return compute(self)

    monkeypatch.setattr(Evaluator, "compute_held_out_loss", wait)
    record = workshop.run(workshop.recipe(Lora(r=2), train={"steps": 4}, evaluate={"interval": 1}))
    assert record.held_out_curve is not None
    assert all(point.seconds >= 0.5 for point in record.held_out_curve.points)
    assert max(record.step_seconds) < 0.5
    assert record.phase_seconds["train"] < 2.0


def test_missing_validation_split_is_refused(workshop: Workshop, corpus: Files) -> None:
    """The test split must not select weights; the error names the key to set."""
    source = corpus.model_copy(update={"validation": None})
    recipe = workshop.recipe(Lora(r=2), data={"source": source}, evaluate={"interval": 1})
    with pytest.raises(EmptySplitError, match=r"evaluate\.interval .* data\.source\.validation is not set"):
        Run(recipe)


def keep_best_recipe(workshop: Workshop, **parts: Any) -> Recipe:
    """Return the recipe of a run that evaluates each step and saves the best weights."""
    checkpoint = Checkpoint(keep_best=True, **parts.pop("checkpoint", {}))
    settings: dict[str, Any] = {"optimizer": LARGE_STEPS, "checkpoint": checkpoint, "save_model": True} | parts
    return workshop.recipe(Lora(r=2), train={"steps": 4}, evaluate={"interval": 1}, **settings)


@pytest.mark.parametrize(
    "optimizer", [LARGE_STEPS, ScheduleFree(learning_rate=0.05)], ids=lambda optimizer: optimizer.kind
)
def test_best_weights_are_saved_and_evaluated(
    optimizer: Optimizer, workshop: Workshop, fake_losses: Callable[[list[float]], None]
) -> None:
    """The result is that of a run that ends at the best step, with the schedule of the longer one."""
    constant: dict[str, Any] = {"schedule": {"kind": "constant"}, "optimizer": optimizer}
    short = workshop.run(workshop.recipe(Lora(r=2), train={"steps": 2}, **constant))
    fake_losses([3.0, 1.0, 2.0, 1.0])
    record = workshop.run(keep_best_recipe(workshop, **constant))
    assert record.steps == 4
    assert record.held_out_curve is not None
    assert record.held_out_curve.kept_step == 2
    assert record.quality == short.quality
    assert any("those of step 2" in note for note in record.notes)
    run_dir = RunDir(workshop.output / "run")
    assert not run_dir.best_weights_dir.exists()
    evaluated = evaluate_saved(keep_best_recipe(workshop, **constant))
    assert evaluated.quality == short.quality
    assert evaluated.held_out_curve == record.held_out_curve


def evaluate_saved(recipe: Recipe) -> RunRecord:
    """Evaluate the saved model of ``recipe`` and return the record."""
    reset_accelerators()
    with use_small_matmul():
        return Run(recipe, evaluate_only=True).execute()[0]


def test_only_needed_weights_stay_on_disk(
    workshop: Workshop, fake_losses: Callable[[list[float]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of the best step and of the best step before each checkpoint."""
    kept: list[list[int]] = []
    delete = best_weights.BestWeights.delete_unused

    def delete_and_list(self: best_weights.BestWeights, curve: Any) -> None:
        delete(self, curve)
        kept.append(sorted(get_checkpoint_step(path) for path in self.manager.list_checkpoints()))

    monkeypatch.setattr(best_weights.BestWeights, "delete_unused", delete_and_list)
    fake_losses([4.0, 3.0, 2.0, 1.0])
    workshop.run(keep_best_recipe(workshop, checkpoint={"interval": 2, "keep_latest": 1}))
    assert kept == [[], [1], [2], [2, 3], [2, 4]]


def test_missing_best_weights_are_an_error(
    workshop: Workshop, fake_losses: Callable[[list[float]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last weights are not silently used instead."""
    fake_losses([1.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(CheckpointManager, "_commit", lambda *_: None)
    with pytest.raises(CheckpointError, match="the weights of step 1, is missing or damaged"):
        workshop.run(keep_best_recipe(workshop))


def early_stopping_recipe(workshop: Workshop, **keys: Any) -> Recipe:
    """Return the recipe of a run that evaluates each of 6 steps and may stop early."""
    return workshop.recipe(
        Lora(r=2), train={"steps": 6}, evaluate={"interval": 1}, early_stopping=EarlyStopping(**keys)
    )


@pytest.mark.parametrize(
    ("keys", "losses", "steps"),
    [
        ({"patience": 1}, [3.0, 2.0, 2.0, 1.0, 1.0, 1.0], 3),
        ({"patience": 2}, [3.0, 2.0, 2.5, 1.9, 2.0, 1.9], 6),
        ({"patience": 2, "min_delta": 0.5}, [3.0, 2.8, 2.6, 1.0, 1.0, 1.0], 3),
        ({"patience": 1}, [float("nan"), 2.0, 1.0, 1.0, 1.0, 1.0], 1),
    ],
    ids=["no decrease", "decrease in time", "decreases too small", "not finite"],
)
def test_training_stops_early(
    keys: dict[str, Any],
    losses: list[float],
    steps: int,
    workshop: Workshop,
    fake_losses: Callable[[list[float]], None],
) -> None:
    """It ends after ``patience`` evaluations in a row that are not ``min_delta`` below the lowest loss before them."""
    fake_losses(losses[:steps])
    record = workshop.run(early_stopping_recipe(workshop, **keys))
    assert record.outcome.kind == "ok"
    assert record.steps == len(record.step_losses) == steps
    assert record.stopped_early == (steps < 6)
    assert any(f"after {steps} of 6 steps" in note for note in record.notes) == (steps < 6)
    assert record.throughput is not None
    assert record.quality is not None


@pytest.mark.parametrize("stopped_at", [2, 3], ids=["before the stop", "at the stop"])
def test_patience_survives_a_resume(
    stopped_at: int, workshop: Workshop, fake_losses: Callable[[list[float]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is interrupted after a checkpoint ends at the same step, with the same curve and the best weights."""
    recipe = early_stopping_recipe(workshop, patience=2).model_copy(
        update={"checkpoint": Checkpoint(interval=1, keep_best=True), "optimizer": LARGE_STEPS}
    )
    losses = [1.0, 2.0, 3.0]
    fake_losses(losses)
    whole = workshop.run(recipe.model_copy(update={"name": "whole"}))
    save, interrupts = CheckpointManager.save, list[int]()

    def save_and_stop(self: CheckpointManager, step: int, state: dict[str, Any]) -> None:
        save(self, step, state)
        if step == stopped_at and not interrupts:
            interrupts.append(step)
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(CheckpointManager, "save", save_and_stop)
        fake_losses(losses[:stopped_at])
        assert workshop.run(recipe).outcome.kind == "preempted"
    fake_losses(losses[stopped_at:])
    resumed = workshop.run(recipe)
    assert resumed.resumed_after == (stopped_at,)
    assert read_curve(resumed) == read_curve(whole)
    assert resumed.stopped_early
    assert resumed.steps == whole.steps == 3
    assert resumed.step_losses == whole.step_losses
    assert resumed.held_out_curve is not None
    assert resumed.held_out_curve.kept_step == 1
    assert resumed.quality == whole.quality


def test_metrics_during_training(workshop: Workshop) -> None:
    """Their means are those of the evaluation after the training, and the losses are those without them."""
    generate = {"metrics": ("rouge",), "split": "validation", "max_new_tokens": 4}
    method = PromptTuning(num_virtual_tokens=4)
    plain = workshop.run(workshop.recipe(method, model={"dropout": 0.2}, evaluate=generate))
    keys = generate | {"interval": 2, "interval_metrics": True}
    record = workshop.run(workshop.recipe(method, model={"dropout": 0.2}, evaluate=keys))
    assert record.step_losses == plain.step_losses
    assert record.held_out_curve is not None
    assert record.quality is not None
    first, last = record.held_out_curve.points
    assert last.metrics == {name: score.interval.mean for name, score in record.quality.metrics.items()}
    assert set(first.metrics) == set(last.metrics)


def test_trackers_receive_the_curve(workshop: Workshop) -> None:
    """TensorBoard has a point for each evaluation, at its step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    record = workshop.run(workshop.recipe(Lora(r=2), evaluate={"interval": 2}, trackers=("tensorboard",)))
    events = EventAccumulator(str(workshop.output / "run" / "peftbench"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("held_out_loss")]
    assert logged == [(step, pytest.approx(loss)) for step, loss in read_curve(record)]


@pytest.mark.parametrize("keep_best", [True, False])
def test_changed_validation_data_is_trained_on_if_it_selects(
    keep_best: bool, workshop: Workshop, tmp_path: Path
) -> None:
    """Other validation examples may select other weights; without a selection they change the evaluation only."""
    (tmp_path / "data").mkdir()
    splits = {name: examples(8, seed=seed) for seed, name in enumerate(("train", "validation", "test"))}
    recipe = workshop.recipe(
        Lora(r=2),
        data={"source": write_corpus(tmp_path / "data", splits)},
        evaluate={"interval": 1},
        checkpoint=Checkpoint(keep_best=keep_best),
        save_model=True,
    )
    first = workshop.run(recipe)
    write_corpus(tmp_path / "data", splits | {"validation": examples(9, seed=9)})
    assert (workshop.run(recipe).step_seconds != first.step_seconds) == keep_best


def test_checkpoint_of_an_earlier_version_resumes(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint without a curve starts one; its steps are trained as if it had one."""
    recipe = workshop.recipe(Lora(r=2), train={"steps": 4}, checkpoint=Checkpoint(interval=1), evaluate={"interval": 2})
    whole = workshop.run(recipe.model_copy(update={"name": "whole"}))
    save = CheckpointManager.save

    def save_without_new_keys(self: CheckpointManager, step: int, state: dict[str, Any]) -> None:
        del state["held_out_curve"], state["progress"]["stopped_early"]
        save(self, step, state)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(CheckpointManager, "save", save_without_new_keys)
        assert workshop.run(recipe).outcome.kind == "preempted"
    resumed = workshop.run(recipe)
    assert resumed.resumed_after == (3,)
    assert resumed.step_losses == whole.step_losses
    assert read_curve(resumed) == read_curve(whole)[1:]


def test_evaluation_counts_in_the_time_between_stop_request_and_limit(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that receives its stop signal too late for an evaluation is refused after the first one."""
    compute = Evaluator.compute_held_out_loss

    def wait(self: Evaluator) -> HeldOutLoss:
        time.sleep(1)
        return compute(self)

    monkeypatch.setattr(Evaluator, "compute_held_out_loss", wait)
    monkeypatch.setenv(STOP_LEAD_ENV, "0.9")
    recipe = workshop.recipe(Lora(r=2), train={"steps": 6}, evaluate={"interval": 4})
    with pytest.raises(TimeLimitError, match=r"its evaluation 1\.\d s and its checkpoint"):
        workshop.run(recipe)
    assert read_record(workshop.output / "run" / "record.json").steps == 4


def test_out_of_memory_names_the_evaluation(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outcome has the phase of the evaluation, not a step of the training."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Evaluator, "_compute_losses", fail)
    outcome = workshop.run(workshop.recipe(Lora(r=2), evaluate={"interval": 2})).outcome
    assert (outcome.kind, outcome.phase, outcome.step) == ("oom", "evaluate", None)


def test_loss_that_is_not_finite_is_recorded(workshop: Workshop, fake_losses: Callable[[list[float]], None]) -> None:
    """The training continues, another step is the best one, and the record can be read again."""
    fake_losses([float("nan"), 2.0, float("inf"), 3.0])
    record = workshop.run(keep_best_recipe(workshop))
    assert record.outcome.kind == "ok"
    read = read_record(workshop.output / "run" / "record.json")
    assert [str(loss) for _, loss in read_curve(read)] == ["nan", "2.0", "inf", "3.0"]
    assert read.held_out_curve is not None
    assert read.held_out_curve.kept_step == 2
