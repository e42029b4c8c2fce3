"""A finished training is kept when its evaluation fails, and its saved model is evaluated without training."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peftbench.errors import ModelError, RecordError
from peftbench.evaluation.evaluator import Evaluator
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.optim import SGD
from peftbench.recipe.schema import Evaluate, Profile, Recipe
from peftbench.record import Device, Memory, Outcome, RunRecord, read_record
from peftbench.run.outcome import UNEVALUATED
from peftbench.run.record_builder import add_evaluation
from peftbench.run.runner import Run
from peftbench.run_dir.results import load_existing_result
from peftbench.run_dir.saved_model import has_model_of
from peftbench.training import loop
from tests.helpers.corpus import examples, write_corpus
from tests.helpers.methods import every_method
from tests.helpers.short_runs import use_small_matmul
from tests.helpers.training import reset_accelerators
from tests.helpers.workshop import Workshop

QUICK: dict[str, Any] = {"metrics": (), "max_new_tokens": 8, "bootstrap_resamples": 100}
OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has")


def raise_error(error: BaseException) -> Callable[..., None]:
    """Return a function that raises ``error``."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def fail_generation(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make every batch of generation raise ``error``."""
    monkeypatch.setattr(Evaluator, "_generate", raise_error(error))


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a test fail if a step is trained."""
    monkeypatch.setattr(loop, "train_step", lambda *_, **__: pytest.fail("a step was trained"))


def evaluate(recipe: Recipe) -> RunRecord:
    """Evaluate the saved model of ``recipe`` and return the record."""
    reset_accelerators()
    with use_small_matmul():
        return Run(recipe, evaluate_only=True).execute()[0]


def with_evaluation(recipe: Recipe, **keys: Any) -> Recipe:
    """Return ``recipe`` with keys of ``evaluate`` replaced."""
    return recipe.model_copy(update={"evaluate": Evaluate(**{**recipe.evaluate.model_dump(), **keys})})


@every_method
def test_saved_model_is_evaluated_to_the_same_quality(
    method: Method, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and texts equal those of the process that trained, and the training's measurements are kept."""
    recipe = workshop.recipe(method, save_model=True, evaluate={"metrics": None, "teacher_forced": True})
    trained = workshop.run(recipe)
    outputs = (workshop.output / "run" / "outputs.jsonl").read_text(encoding="utf-8")
    forbid_training(monkeypatch)
    record = evaluate(recipe)
    assert record.outcome.kind == "ok"
    assert trained.quality is not None
    assert record.quality is not None
    assert record.quality.loss == pytest.approx(trained.quality.loss, rel=1e-6)
    assert record.quality.metrics == trained.quality.metrics
    assert (workshop.output / "run" / "outputs.jsonl").read_text(encoding="utf-8") == outputs
    changed = {"quality", "phase_seconds", "memory", "memory_by_rank", "evaluated_at"}
    assert trained.evaluated_at is None
    assert record.evaluated_at is not None
    assert record.model_dump(exclude=changed) == trained.model_dump(exclude=changed)
    kept = {"load", "build", "train", "save"}
    assert {name: record.phase_seconds[name] for name in kept} == {name: trained.phase_seconds[name] for name in kept}


def test_model_of_an_earlier_schema_is_evaluated(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training.json has fingerprints of keys that have other names now, and belongs to the record by its start."""
    recipe = workshop.recipe(Lora(r=2), save_model=True)
    record = workshop.run(recipe)
    file = workshop.output / "run" / "model" / "training.json"
    identity = json.loads(file.read_text(encoding="utf-8"))
    assert identity.pop("schema_version") == record.schema_version
    earlier = identity | {"training_fingerprint": "earlier", "measurement_fingerprint": "earlier"}
    file.write_text(json.dumps(earlier), encoding="utf-8")
    assert has_model_of(workshop.output / "run", record)
    forbid_training(monkeypatch)
    assert evaluate(recipe).outcome.kind == "ok"
    file.write_text(json.dumps(earlier | {"started_at": "2026-01-01T00:00:00+00:00"}), encoding="utf-8")
    assert not has_model_of(workshop.output / "run", record)


def test_generation_out_of_memory_keeps_model_and_loss(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record has the held-out loss, the throughput and the phase; the model is saved and can be evaluated."""
    recipe = workshop.recipe(Lora(r=2), save_model=True, evaluate={"metrics": None}, profile=Profile(untimed_steps=1))
    with monkeypatch.context() as patch:
        fail_generation(patch, OOM)
        record = workshop.run(recipe)
    assert (record.outcome.kind, record.outcome.phase) == ("oom", "generate")
    assert record.quality is not None
    assert record.quality.loss is not None
    assert record.throughput is not None
    assert record.notes[-1] == "evaluate.batch_size=16 ran out of memory; it was halved to 1"
    forbid_training(monkeypatch)
    evaluated = evaluate(with_evaluation(recipe, batch_size=1))
    assert evaluated.outcome.kind == "ok"
    assert evaluated.quality is not None
    assert evaluated.quality.metrics
    assert evaluated.quality.loss == pytest.approx(record.quality.loss)
    assert evaluated.recipe["evaluate"]["batch_size"] == 1
    assert evaluated.throughput == record.throughput


@pytest.mark.parametrize(
    ("save_model", "error"),
    [
        pytest.param(True, OOM, id="saved-oom"),
        pytest.param(True, RuntimeError("a bug"), id="saved-failed"),
        pytest.param(True, KeyboardInterrupt(), id="saved-stopped"),
        pytest.param(False, OOM, id="not saved-oom"),
        pytest.param(False, RuntimeError("a bug"), id="not saved-failed", marks=pytest.mark.slow),
        pytest.param(False, KeyboardInterrupt(), id="not saved-stopped", marks=pytest.mark.slow),
    ],
)
def test_rerun_after_a_failed_evaluation_trains_nothing(
    save_model: bool, error: BaseException, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mended recipe, started again, evaluates the saved model or, without one, resumes from the last step."""
    recipe = workshop.recipe(Lora(r=2), save_model=save_model, evaluate={"metrics": None})
    with monkeypatch.context() as patch:
        fail_generation(patch, error)
        try:
            workshop.run(recipe)
        except RuntimeError:
            assert str(error) == "a bug"
    forbid_training(monkeypatch)
    record = workshop.run(with_evaluation(recipe, batch_size=2))
    assert record.outcome.kind == "ok"
    assert len(record.step_losses) == 3
    assert record.quality is not None
    assert record.quality.metrics


def test_killed_evaluation_leaves_a_record_of_the_training(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record that a kill would leave is written before the evaluation, and has the training's measurements."""
    record_file, seen = workshop.output / "run" / "record.json", []

    def read_and_fail(*_: object) -> None:
        seen.append(read_record(record_file))
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluator, "_compute_losses", read_and_fail)
    workshop.run(workshop.recipe(Full(), save_model=True, profile=Profile(untimed_steps=1)))
    (record,) = seen
    assert (record.outcome.kind, record.outcome.phase, record.outcome.error) == ("failed", "evaluate", UNEVALUATED)
    assert len(record.step_losses) == 3
    assert record.throughput is not None
    assert record.compute.matmul_flops_per_second is not None


def test_batch_is_halved_until_it_fits(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of more than 3 examples run out of memory: 5 becomes 2, every example counts once, and it is noted."""
    compute, sizes = Evaluator._compute_losses, []

    def fail_if_large(self: Evaluator, rows: list[dict[str, Any]]) -> list[tuple[float, int]]:
        sizes.append(len(rows))
        if len(rows) > 3:
            raise OOM
        return compute(self, rows)

    recipe = workshop.recipe(Full(), evaluate={"batch_size": 5})
    expected = workshop.run(recipe).quality
    monkeypatch.setattr(Evaluator, "_compute_losses", fail_if_large)
    record = workshop.run(recipe)
    assert sizes == [5, 2, 2, 2, 2]
    assert record.outcome.kind == "ok"
    assert record.notes == ("evaluate.batch_size=5 ran out of memory; it was halved to 2",)
    assert expected is not None
    assert record.quality is not None
    assert record.quality.loss == pytest.approx(expected.loss)
    assert record.quality.per_example is not None
    assert len(record.quality.per_example.loss) == 8


@pytest.mark.parametrize(
    ("batch_sizes", "notes"),
    [
        ([5, 5], []),
        ([5, 2], ["evaluate.batch_size=5 ran out of memory; it was halved to 2 on rank 1"]),
        ([2, 5, 1], ["evaluate.batch_size=5 ran out of memory; it was halved to 1 on rank 0, 2"]),
    ],
)
def test_halved_batches_of_all_ranks_are_noted(
    batch_sizes: list[int], notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note has the smallest batch, also of ranks that write no record."""
    evaluator = object.__new__(Evaluator)
    evaluator.accelerator = SimpleNamespace(num_processes=len(batch_sizes))  # type: ignore[assignment]
    evaluator.config, evaluator.batch_size, evaluator.notes = Evaluate(batch_size=5), batch_sizes[0], []
    gathered = iter([[(1, "b"), (0, "a")], batch_sizes])
    monkeypatch.setattr("peftbench.evaluation.evaluator.gather_object", lambda _: next(gathered))
    assert evaluator._gather_in_order([(0, "a")]) == ["a", "b"]
    assert evaluator.notes == notes


def test_later_evaluation_replaces_memory_by_rank() -> None:
    """The phases of the evaluation are those of the later process; with other ranks they are not known by rank."""
    values = {"name": "run", "started_at": "2026-01-01", "recipe": {}, "recipe_fingerprint": "", "library_versions": {}}
    common = values | {"outcome": Outcome(kind="ok"), "device": Device(type="cpu", name="", num_processes=2)}
    train, old, new = (Memory(rss_bytes=size) for size in (1, 2, 3))
    trained = RunRecord(**common, memory_by_rank=({"train": train, "evaluate": old, "generate": old},) * 2)
    evaluated = RunRecord(**common, memory_by_rank=({"load": new, "evaluate": new},) * 2)
    on_one = RunRecord(**common, memory_by_rank=({"load": new, "evaluate": new},))
    assert add_evaluation(trained, evaluated).memory_by_rank == ({"train": train, "evaluate": new},) * 2
    assert add_evaluation(trained, on_one).memory_by_rank == ({"train": train},) * 2


@pytest.mark.parametrize(
    ("changes", "trains"),
    [
        ({"evaluate": Evaluate(metrics=(), max_new_tokens=4, bootstrap_resamples=100)}, False),
        ({"evaluate": Evaluate(**QUICK, general_text="shipped")}, False),
        pytest.param({"evaluate": Evaluate(**QUICK, interval=2)}, True, marks=pytest.mark.slow),
        pytest.param({"profile": Profile(untimed_steps=1)}, True, marks=pytest.mark.slow),
        ({"method": Lora(r=4)}, True),
        ({}, True),
    ],
    ids=["evaluation", "general text", "evaluation during training", "profile", "method", "unchanged"],
)
def test_only_a_changed_evaluation_reuses_the_model(changes: dict[str, Any], trains: bool, workshop: Workshop) -> None:
    """A changed measurement is made again, and a complete run that is requested again is repeated."""
    recipe = workshop.recipe(Lora(r=2), save_model=True)
    first = workshop.run(recipe)
    second = workshop.run(recipe.model_copy(update=changes))
    assert (second.step_seconds != first.step_seconds) == trains


@pytest.mark.parametrize("split", ["train", "test"])
def test_changed_training_data_is_trained_on(split: str, workshop: Workshop, tmp_path: Path) -> None:
    """A change of the evaluated split keeps the training; a change of the training split does not."""
    splits = {name: examples(8, seed=seed) for seed, name in enumerate(("train", "validation", "test"))}
    (tmp_path / "data").mkdir()
    source = write_corpus(tmp_path / "data", splits)
    recipe = workshop.recipe(Lora(r=2), save_model=True, data={"source": source}, train={"steps": 2})
    first = workshop.run(recipe)
    write_corpus(tmp_path / "data", splits | {split: examples(9, seed=9)})
    second = workshop.run(recipe)
    assert second.num_examples == {"train": 9 if split == "train" else 8, "test": 9 if split == "test" else 8}
    assert (second.step_seconds == first.step_seconds) == (split == "test")


def _change_weights(base: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})


def _change_config(base: Path) -> None:
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.1}), encoding="utf-8")


@pytest.mark.parametrize("change", [_change_weights, _change_config])
@pytest.mark.parametrize("method", [Lora(r=2), LastLayer()], ids=["lora", "last_layer"])
def test_changed_base_model_is_noticed(
    method: Method, change: Callable[[Path], None], workshop: Workshop, tmp_path: Path
) -> None:
    """An adapter is not evaluated on another base model; a whole model does not need its base."""
    base = tmp_path / "base"
    base.mkdir()
    for file in workshop.base_folder("gpt2_tied").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    recipe = workshop.recipe(method, save_model=True, model={"path": str(base)})
    first = workshop.run(recipe)
    change(base)
    if method.keeps_base_frozen:
        with pytest.raises(ModelError, match="has changed since"):
            evaluate(recipe)
    else:
        assert evaluate(recipe).quality == first.quality
    assert workshop.run(with_evaluation(recipe, batch_size=2)).step_seconds != first.step_seconds


def test_evaluation_refuses_another_training(workshop: Workshop) -> None:
    """Without a saved model, or with that of another recipe, there is nothing to evaluate."""
    recipe = workshop.recipe(Lora(r=2), save_model=True)
    with pytest.raises(RecordError, match="has no saved model with the record of its training"):
        evaluate(recipe)
    assert not (workshop.output / "run").exists()
    workshop.run(recipe)
    with pytest.raises(RecordError, match="was trained with another recipe"):
        evaluate(recipe.model_copy(update={"method": Lora(r=4)}))


def read_run(workshop: Workshop) -> tuple[RunRecord, str]:
    """Return the record and the outputs of the run."""
    folder = workshop.output / "run"
    return read_record(folder / "record.json"), (folder / "outputs.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("place", ["peftbench.run.runner.build_encoder", "_compute_losses", "_generate"])
def test_failed_evaluation_keeps_a_complete_result(
    place: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends it and wherever, the record and the outputs of the complete evaluation stay."""
    recipe = workshop.recipe(Lora(r=2), save_model=True, evaluate={"metrics": None})
    workshop.run(recipe)
    before = read_run(workshop)
    target = place if "." in place else f"peftbench.evaluation.evaluator.Evaluator.{place}"
    for error in (KeyboardInterrupt(), OOM, RuntimeError("a bug"), ModelError("changed")):
        monkeypatch.setattr(target, raise_error(error))
        if isinstance(error, (KeyboardInterrupt, torch.OutOfMemoryError)):
            assert evaluate(recipe).outcome.kind in {"preempted", "oom"}, error
        else:
            with pytest.raises(type(error)):
                evaluate(recipe)
        assert read_run(workshop) == before, error


def test_known_loss_survives_a_rerun_that_is_stopped_while_loading(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of the failed evaluation stays until a later one has a held-out loss."""
    recipe = workshop.recipe(Lora(r=2), save_model=True, evaluate={"metrics": None})
    with monkeypatch.context() as patch:
        fail_generation(patch, OOM)
        record = workshop.run(recipe)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("peftbench.run.runner.build_encoder", fail)
    with pytest.raises(ZeroDivisionError):
        workshop.run(with_evaluation(recipe, batch_size=1))
    assert read_record(workshop.output / "run" / "record.json") == record


@pytest.mark.parametrize("keys", [{"profile": Profile(untimed_steps=1)}, {"train": {"micro_batch_size": 2}}])
def test_failed_evaluation_is_mended_with_other_measurement_settings(
    keys: dict[str, Any], workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is not repeated, and a note has the settings with which it was measured."""
    recipe = workshop.recipe(Lora(r=2), save_model=True, evaluate={"metrics": None})
    with monkeypatch.context() as patch:
        fail_generation(patch, OOM)
        first = workshop.run(recipe)
    forbid_training(monkeypatch)
    mended = workshop.recipe(Lora(r=2), save_model=True, evaluate={"metrics": None}, **keys)
    record = workshop.run(mended)
    assert record.outcome.kind == "ok"
    assert record.step_seconds == first.step_seconds
    (note,) = [note for note in record.notes if "was measured with" in note]
    assert ("profile.untimed_steps=0" in note) == ("profile" in keys)
    assert ("train.micro_batch_size=null" in note) == ("train" in keys)


def test_status_of_an_evaluated_run_is_finished(workshop: Workshop) -> None:
    """The status file of the evaluation is newer than the training."""
    from peftbench.suite.status import collect_run_statuses

    recipe = workshop.recipe(Lora(r=2), save_model=True)
    workshop.run(recipe)
    time.sleep(1.1)  # times have seconds
    evaluate(recipe)
    (status,) = collect_run_statuses(workshop.output, {})
    assert status.state == "finished"


def test_evaluation_does_not_hide_changed_training_data(workshop: Workshop, tmp_path: Path) -> None:
    """The recipe counts as changed, so that it is trained again, and a note names the change."""
    (tmp_path / "data").mkdir()
    splits = {name: examples(8, seed=seed) for seed, name in enumerate(("train", "validation", "test"))}
    source = write_corpus(tmp_path / "data", splits)
    recipe = workshop.recipe(Lora(r=2), save_model=True, data={"source": source}, train={"steps": 1})
    workshop.run(recipe)
    write_corpus(tmp_path / "data", splits | {"train": examples(9, seed=9)})
    record = evaluate(recipe)
    assert "the training data have changed since the training" in record.notes
    assert record.num_examples == {"train": 8, "test": 8}
    assert load_existing_result(recipe) is None


def test_evaluation_works_without_the_training_split(workshop: Workshop, tmp_path: Path) -> None:
    """Only the number of shared examples is unknown."""
    (tmp_path / "data").mkdir()
    splits = {name: examples(8, seed=seed) for seed, name in enumerate(("train", "validation", "test"))}
    source = write_corpus(tmp_path / "data", splits)
    recipe = workshop.recipe(Lora(r=2), save_model=True, data={"source": source}, train={"steps": 1})
    trained = workshop.run(recipe)
    (tmp_path / "data" / "train.jsonl").unlink()
    record = evaluate(recipe)
    assert record.outcome.kind == "ok"
    assert record.split_overlap == trained.split_overlap
    assert any(note.startswith("examples shared with the training split are unknown: ") for note in record.notes)


def test_repeated_evaluation_does_not_repeat_notes(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note on a halved batch is that of the last evaluation."""
    recipe = workshop.recipe(LastLayer(), save_model=True, train={"gradient_checkpointing": True})
    notes = workshop.run(recipe).notes
    assert len(notes) == 1
    assert evaluate(recipe).notes == evaluate(recipe).notes == notes


def test_diverged_training_is_repeated_on_request(workshop: Workshop) -> None:
    """A divergence is a result; requested again, the run trains again."""
    recipe = workshop.recipe(
        Full(), optimizer=SGD(learning_rate=1e30), train={"steps": 1, "max_grad_norm": None}, save_model=True
    )
    first, second = workshop.run(recipe), workshop.run(recipe)
    assert first.outcome.kind == second.outcome.kind == "diverged"
    assert first.step_seconds != second.step_seconds


def test_out_of_memory_while_loading_keeps_the_trained_steps(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record of the same recipe with steps is not replaced by one of 0 steps."""
    recipe = workshop.recipe(Lora(r=2))
    record = workshop.run(recipe)

    def fail(*_: object) -> None:
        raise OOM

    monkeypatch.setattr("peftbench.run.runner.load_base_model", fail)
    assert workshop.run(recipe).outcome.kind == "oom"
    assert read_record(workshop.output / "run" / "record.json") == record
