"""Scores are computed again from the outputs of a run, without its model."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peftbench.data.sources import Files
from peftbench.errors import OutOfRangeError, RecordError, UnknownKeyError
from peftbench.evaluation.metrics.rouge import Rouge
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.recipe.schema import Evaluate, Recipe
from peftbench.record import read_record
from peftbench.run.rescoring import rescore_outputs
from tests.helpers.summaries import load_summaries
from tests.helpers.workshop import Workshop


def build_recipe(workshop: Workshop, method: Method, **evaluate: Any) -> Recipe:
    """Return a recipe that generates text, resolved like that of a record."""
    values = {"metrics": None} | evaluate
    return workshop.recipe(method, save_model=method.kind == "lora", evaluate=values).with_resolved_dtype()


def with_evaluation(recipe: Recipe, **keys: Any) -> Recipe:
    """Return ``recipe`` with keys of ``evaluate`` replaced."""
    return recipe.model_copy(update={"evaluate": Evaluate(**{**recipe.evaluate.model_dump(), **keys})})


def test_metrics_are_computed_again_from_the_outputs(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure of a metric loses no text, and neither model nor data is needed for another attempt."""
    recipe = build_recipe(workshop, Lora(r=2), saved_samples=2)
    complete = workshop.run(recipe)

    def fail(*_: object) -> dict[str, tuple[float, ...]]:
        raise ZeroDivisionError("a bug of a metric")

    with monkeypatch.context() as patch:
        patch.setattr(Rouge, "score_texts", fail)
        with pytest.raises(ZeroDivisionError):
            workshop.run(recipe)
    failed = read_record(workshop.output / "run" / "record.json")
    assert failed.outcome.kind == "failed"
    assert failed.quality is not None
    assert failed.quality.metrics == {}
    assert len(failed.quality.samples) == 2
    monkeypatch.setattr(Files, "load", lambda *_: pytest.fail("the data was loaded"))
    outcome, path = rescore_outputs(recipe)
    record = read_record(path)
    assert outcome == record.outcome
    assert record.outcome.kind == "ok"
    assert record.quality == complete.quality


def test_metric_is_added_from_the_outputs(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs neither model nor data; other scores, the recipe and the headline metric stay."""
    recipe = build_recipe(workshop, Lora(r=2))
    before = workshop.run(recipe)
    monkeypatch.setattr(Files, "load", lambda *_: pytest.fail("the data was loaded"))
    for _ in range(2):
        _, path = rescore_outputs(recipe, ["exact_match", "perplexity"])
        after = read_record(path)
        assert before.quality is not None
        assert after.quality is not None
        assert list(after.quality.metrics) == [*before.quality.metrics, "exact_match", "perplexity"]
        assert after.quality.metrics["rougeL"] == before.quality.metrics["rougeL"]
        assert after.quality.headline_metric == "rougeL"
        assert after.recipe_fingerprint == before.recipe_fingerprint
    with pytest.raises(RecordError, match="the metric choice_accuracy needs log-likelihoods of choices, which"):
        rescore_outputs(recipe, ["choice_accuracy"])
    with pytest.raises(UnknownKeyError, match="--metric: there is no metric 'exact'; did you mean 'exact_match'"):
        rescore_outputs(recipe, ["exact"])
    assert read_record(path) == after


def test_recipe_of_the_scores_is_changed_from_the_outputs(workshop: Workshop) -> None:
    """Other metrics and another headline metric replace those of the record, and are in its recipe."""
    recipe = build_recipe(workshop, Full())
    workshop.run(recipe)
    keys = {"metrics": ("exact_match", "rouge"), "headline_metric": "rouge1"}
    changed = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=keys)})
    _, path = rescore_outputs(changed)
    record = read_record(path)
    assert record.quality is not None
    assert list(record.quality.metrics) == ["exact_match", "rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert record.quality.headline_metric == "rouge1"
    assert record.recipe_fingerprint == changed.fingerprint() != recipe.fingerprint()
    longer = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"max_new_tokens": 4})})
    with pytest.raises(OutOfRangeError, match=r"override only evaluate\.metrics, evaluate\.headline_metric"):
        rescore_outputs(longer)


def test_outputs_have_every_example(workshop: Workshop) -> None:
    """One line per example of the split, in its order, also the teacher-forced text."""
    workshop.run(workshop.recipe(Full(), evaluate={"metrics": None, "teacher_forced": True, "saved_samples": 1}))
    lines = (workshop.output / "run" / "outputs.jsonl").read_text(encoding="utf-8").splitlines()
    outputs = [json.loads(line) for line in lines]
    assert [output["reference"] for output in outputs] == list(load_summaries(workshop.source, "test")["summary"])
    assert all(set(output) == {"id", "reference", "generated", "teacher_forced"} for output in outputs)


def test_outputs_of_an_earlier_run_are_deleted(workshop: Workshop) -> None:
    """A record without generated texts does not keep those of the run that it replaces."""
    workshop.run(workshop.recipe(Full(), evaluate={"metrics": None}))
    workshop.run(workshop.recipe(Full()))
    assert not (workshop.output / "run" / "outputs.jsonl").exists()
    with pytest.raises(RecordError, match=r"outputs\.jsonl cannot be read"):
        rescore_outputs(workshop.recipe(Full()))


@pytest.mark.parametrize("damage", ["{", '{"id": "0"}', ""])
def test_damaged_outputs_are_refused(damage: str, workshop: Workshop) -> None:
    """The sentence names the line or the difference, and the record is unchanged."""
    recipe = build_recipe(workshop, Full())
    record = workshop.run(recipe)
    path = workshop.output / "run" / "outputs.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("\n", f"\n{damage}\n", 1), encoding="utf-8")
    with pytest.raises(RecordError, match=r"line 2 of .* is not an output"):
        rescore_outputs(recipe)
    path.write_text(path.read_text(encoding="utf-8").partition("\n")[0] + "\n", encoding="utf-8")
    with pytest.raises(RecordError, match="do not match the evaluated examples"):
        rescore_outputs(recipe)
    assert read_record(workshop.output / "run" / "record.json") == record


def test_outputs_are_not_scored_for_another_recipe(workshop: Workshop) -> None:
    """Only the settings of the intervals may change."""
    recipe = build_recipe(workshop, Lora(r=2))
    workshop.run(recipe)
    with pytest.raises(OutOfRangeError, match="generated with another recipe"):
        rescore_outputs(recipe.model_copy(update={"method": Lora(r=64)}))
    with pytest.raises(OutOfRangeError, match="generated with another recipe"):
        rescore_outputs(with_evaluation(recipe, max_new_tokens=4))
    outcome, _ = rescore_outputs(with_evaluation(recipe, bootstrap_resamples=200))
    assert outcome.kind == "ok"
