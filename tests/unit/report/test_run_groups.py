"""Runs that differ in seeds alone stand together, under the name they share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from peftbench.methods.last_layer import LastLayer
from peftbench.record import Device, Outcome
from peftbench.report.analysis.run_groups import group_runs, recipe_key
from tests.helpers.workshop import Workshop
from tests.unit.report.records import costly, judged, noise, record


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["lora-seed=0", "lora-seed=1"], "lora"),
        (["lora-learning_rate=3e-05-seed=0", "lora-learning_rate=3e-05-seed=1"], "lora-learning_rate=3e-05"),
        (["lora-seed=0-seed=5", "lora-seed=1-seed=5"], "lora-seed=5"),
        (["a0", "a1"], "a (lora)"),
        (["mine", "other"], "lora"),
        (["lora", "lora-again"], "lora"),
        (["mine"], "mine (lora)"),
        (["lora-seed=0"], "lora-seed=0"),
        (["lora\n# a heading\t|\x1b[31m"], "lora # a heading | [31m"),
        ([" \n"], "lora"),
    ],
)
def test_a_label_is_what_names_share(names: list[str], label: str) -> None:
    """Of one run it is its name, of several what they share; on one line; with the method where it is not said."""
    (one,) = group_runs([record(name, "lora", 10, seed=seed) for seed, name in enumerate(names)])
    assert (one.label, one.method_kind, len(one.runs)) == (label, "lora", len(names))


def test_labels_are_told_apart() -> None:
    """Two recipes whose runs have one name are two configurations with a label each."""
    found = group_runs([record("lora", "lora", 10), record("lora", "lora", 10, global_batch_size=2)])
    assert [one.label for one in found] == ["lora", "lora #2"]


CARD = Device(type="cuda", name="a GPU", num_processes=1)


def test_two_devices_are_not_two_seeds() -> None:
    """Runs of one recipe on a CPU, on a GPU and on two are three configurations, and the labels say which is which."""
    rows = [
        record("lora", "lora", 10),
        record("lora", "lora", 10, seed=1, device=CARD),
        record("lora", "lora", 10, seed=2, device=CARD.model_copy(update={"num_processes": 2})),
    ]
    found = group_runs(rows)
    assert [one.label for one in found] == ["lora on a CPU", "lora on a GPU", "lora on a GPU with 2 processes"]
    assert [one.runs for one in found] == [(row,) for row in rows]


@pytest.mark.parametrize("what", ["data_fingerprint", "model_fingerprint"])
def test_another_base_or_other_data_are_not_another_seed(what: str) -> None:
    """What a run trained, and on what, is no seed's doing; a run that ended before it knew stands with its like."""
    rows = [
        record("lora-seed=2", "lora", 10, seed=2, outcome=Outcome(kind="failed")),
        record("lora-seed=0", "lora", 10, seed=0, **{what: "a"}),
        record("lora-seed=1", "lora", 10, seed=1, **{what: "b"}),
        record("lora-seed=3", "lora", 10, seed=3, **{what: "a"}),
    ]
    found = group_runs(rows)
    assert sorted([run.name[-1] for run in one.runs] for one in found) == [["1"], ["2", "0", "3"]]
    assert len({one.label for one in found}) == 2


def test_what_changes_no_number_divides_nothing() -> None:
    """A saved model, a tracker or another price are in a recipe, and the run is the same."""
    first = record("lora-seed=0", "lora", 10)
    other = record("lora-seed=1", "lora", 10, seed=1)
    changed = other.recipe | {
        "save_model": True,
        "trackers": ["tensorboard"],
        "checkpoint": {"interval": 2},
        "profile": {"price_per_hour": 2.5},
        "budget": {"memory": None},
        "train": other.recipe["train"] | {"feature_cache": None},
    }
    first = first.model_copy(update={"recipe": first.recipe | {"profile": {}}})
    (one,) = group_runs([first, other.model_copy(update={"recipe": changed})])
    assert len(one.runs) == 2
    held = changed | {"budget": {"memory": "1 GiB"}}
    assert len(group_runs([first, other.model_copy(update={"recipe": held})])) == 2


def _leaves(part: BaseModel, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name in type(part).model_fields:
        inside = getattr(part, name)
        yield from _leaves(inside, (*place, name)) if isinstance(inside, BaseModel) else [(*place, name)]


def _changed(part: BaseModel, knob: tuple[str, ...]) -> Any:
    """With another value there, whatever its type."""
    first, *rest = knob
    value = _changed(getattr(part, first), tuple(rest)) if rest else "another value"
    return part.model_copy(update={first: value})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("asked", [{}, {"budget": {"memory": "1GiB"}, "train": {"steps": 1, "feature_cache": "fp32"}}])
def test_what_changes_no_number_is_what_a_fingerprint_leaves_out(asked: dict[str, Any], workshop: Workshop) -> None:
    """For each knob of a recipe: runs that differ in it are one configuration where their fingerprints are equal."""
    recipe = workshop.recipe(LastLayer(), **asked)
    knobs = list(_leaves(recipe))
    assert len(knobs) > 40
    for knob in knobs:
        other = _changed(recipe, knob)
        same = recipe_key(recipe.model_dump(mode="json")) == recipe_key(other.model_dump(mode="json"))
        assert same == (recipe.fingerprint() == other.fingerprint()), ".".join(knob)


def test_a_seed_that_was_run_twice_is_one() -> None:
    """A suite's own run of seed 0 and the same of ``--seeds`` are one seed, whose figures are averaged first."""
    names = ["full", "full-seed=0", "full-seed=1", "full-seed=2"]
    rows = [
        judged(name, "full", [score], losses=[score], labelled=[1], seed=seed)
        for name, score, seed in zip(names, (1.0, 3.0, 5.0, 9.0), (0, 0, 1, 2), strict=True)
    ]
    (one,) = group_runs(rows)
    assert (one.label, len(one.runs)) == ("full", 4)
    assert one.held_out_losses == one.rouge_l_scores == (2.0, 5.0, 9.0)


def test_records_stay_as_they_are() -> None:
    """Grouping looks at recipes and changes none."""
    there = record("lora-seed=3", "lora", 10, seed=3)
    before = copy.deepcopy(there.recipe)
    group_runs([there])
    assert there.recipe == before


def test_figures_are_means_of_the_runs_that_ended_well() -> None:
    """By hand: of 100 and 300 bytes 200; a run that did not end well is in no figure, but is a run."""
    runs = [
        judged("lora-seed=0", "lora", [1.0, 3.0], seed=0, **costly(100, 1.0, 10)),
        judged("lora-seed=1", "lora", [3.0, 5.0], seed=1, **costly(300, 2.0, 20)),
        judged("lora-seed=2", "lora", [9.0, 9.0], seed=2, outcome=Outcome(kind="diverged"), **(costly(9, 9.0, 9))),
    ]
    (one,) = group_runs(runs)
    assert (len(one.runs), len(one.ok_runs), one.is_trained) == (3, 2, True)
    assert (one.mean_peak_bytes, one.mean_train_seconds, one.mean_model_flops) == (200, 30.0, 15)
    assert one.step_seconds_range == pytest.approx((0.95, 2.1))
    assert (one.rouge_l_scores, one.held_out_losses) == ((2.0, 4.0), ())


def test_what_one_run_does_not_tell_is_unknown() -> None:
    """A mean over some runs alone would be another configuration's figure."""
    known = costly(100, 1.0, 10)
    unknown = record("lora-seed=1", "lora", 10, seed=1, phase_seconds={}, device=known["device"])
    (one,) = group_runs([judged("lora-seed=0", "lora", noise(3, 0), seed=0, **known), unknown])
    assert (one.mean_peak_bytes, one.mean_train_seconds, one.mean_model_flops, one.step_seconds_range) == (
        None,
        None,
        None,
        None,
    )
    assert one.held_out_losses == (3.25,)


def test_baselines_train_nothing() -> None:
    """Neither the untrained base nor the lead has a trained parameter; full fine-tuning has."""
    rows = [judged("b", "zero_shot", [1.0]), record("l", "lead", None), record("f", "full", 10)]
    assert [one.is_trained for one in group_runs(rows)] == [False, False, True]
