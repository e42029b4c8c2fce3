"""Run groups: runs that differ only in seeds, labeled with the common part of their names."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from peftbench.methods.last_layer import LastLayer
from peftbench.record import Device, Outcome
from peftbench.report.analysis.quality_metrics import HELD_OUT_LOSS, QualityMetric
from peftbench.report.analysis.run_groups import group_runs, recipe_key
from tests.helpers.scores import DEFINITIONS
from tests.helpers.workshop import Workshop
from tests.unit.report.records import build_costs, build_judged_record, build_record, draw_scores


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
def test_label_is_the_common_part_of_names(names: list[str], label: str) -> None:
    """Use a single run's own name, on one line, and append the method if the label lacks it."""
    (group,) = group_runs([build_record(name, "lora", 10, seed=seed) for seed, name in enumerate(names)])
    assert (group.label, group.method_kind, len(group.runs)) == (label, "lora", len(names))


ROUGE_L = QualityMetric("rougeL", DEFINITIONS["rougeL"])


def test_equal_names_get_distinct_labels() -> None:
    """Group two recipes whose runs have the same name."""
    groups = group_runs([build_record("lora", "lora", 10), build_record("lora", "lora", 10, global_batch_size=2)])
    assert [group.label for group in groups] == ["lora", "lora #2"]


GPU = Device(type="cuda", name="a GPU", num_processes=1)


def test_runs_on_different_devices_form_separate_groups() -> None:
    """Group runs of one recipe by device and number of processes, and add both to the labels."""
    rows = [
        build_record("lora", "lora", 10),
        build_record("lora", "lora", 10, seed=1, device=GPU),
        build_record("lora", "lora", 10, seed=2, device=GPU.model_copy(update={"num_processes": 2})),
    ]
    groups = group_runs(rows)
    assert [group.label for group in groups] == ["lora on a CPU", "lora on a GPU", "lora on a GPU with 2 processes"]
    assert [group.runs for group in groups] == [(row,) for row in rows]


@pytest.mark.parametrize("fingerprint_field", ["data_fingerprint", "model_fingerprint", "model_config_fingerprint"])
def test_different_model_or_data_form_separate_groups(fingerprint_field: str) -> None:
    """Check that a run that failed before its fingerprints were known joins the first group."""
    rows = [
        build_record("lora-seed=2", "lora", 10, seed=2, outcome=Outcome(kind="failed")),
        build_record("lora-seed=0", "lora", 10, seed=0, **{fingerprint_field: "a"}),
        build_record("lora-seed=1", "lora", 10, seed=1, **{fingerprint_field: "b"}),
        build_record("lora-seed=3", "lora", 10, seed=3, **{fingerprint_field: "a"}),
    ]
    groups = group_runs(rows)
    assert sorted([run.name[-1] for run in group.runs] for group in groups) == [["1"], ["2", "0", "3"]]
    assert len({group.label for group in groups}) == 2


def test_keys_without_effect_on_results_keep_one_group() -> None:
    """Group runs that differ in saving, tracking, checkpoints or price; a memory budget separates them."""
    first = build_record("lora-seed=0", "lora", 10)
    other = build_record("lora-seed=1", "lora", 10, seed=1)
    changed = other.recipe | {
        "save_model": True,
        "trackers": ["tensorboard"],
        "checkpoint": {"interval": 2},
        "profile": {"price_per_hour": 2.5},
        "budget": {"memory": None},
        "train": other.recipe["train"] | {"feature_cache": None},
    }
    first = first.model_copy(update={"recipe": first.recipe | {"profile": {}}})
    (group,) = group_runs([first, other.model_copy(update={"recipe": changed})])
    assert len(group.runs) == 2
    with_budget = changed | {"budget": {"memory": "1 GiB"}}
    assert len(group_runs([first, other.model_copy(update={"recipe": with_budget})])) == 2


def _iterate_keys(section: BaseModel, parents: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        yield from _iterate_keys(value, (*parents, name)) if isinstance(value, BaseModel) else [(*parents, name)]


def _change_key(section: BaseModel, key: tuple[str, ...]) -> Any:
    """Return a copy with another value for this key, whatever its type."""
    first, *rest = key
    value = _change_key(getattr(section, first), tuple(rest)) if rest else "another value"
    return section.model_copy(update={first: value})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize(
    "sections", [{}, {"budget": {"memory": "1GiB"}, "train": {"steps": 1, "feature_cache": "fp32"}}]
)
def test_group_key_and_fingerprint_ignore_the_same_keys(sections: dict[str, Any], workshop: Workshop) -> None:
    """Change each key of a recipe: the group key changes if and only if the fingerprint changes."""
    recipe = workshop.recipe(LastLayer(), **sections)
    keys = list(_iterate_keys(recipe))
    assert len(keys) > 40
    for key in keys:
        other = _change_key(recipe, key)
        same_group = recipe_key(recipe.model_dump(mode="json")) == recipe_key(other.model_dump(mode="json"))
        assert same_group == (recipe.fingerprint() == other.fingerprint()), ".".join(key)


def test_repeated_seed_counts_once() -> None:
    """Average the metrics of two runs with seed 0, e.g. a suite's own run and one of ``--seeds``."""
    names = ["full", "full-seed=0", "full-seed=1", "full-seed=2"]
    rows = [
        build_judged_record(name, "full", [score], losses=[score], labeled=[1], seed=seed)
        for name, score, seed in zip(names, (1.0, 3.0, 5.0, 9.0), (0, 0, 1, 2), strict=True)
    ]
    (group,) = group_runs(rows)
    assert (group.label, len(group.runs)) == ("full", 4)
    assert group.means_by_seed(HELD_OUT_LOSS) == group.means_by_seed(ROUGE_L) == (2.0, 5.0, 9.0)


def test_grouping_does_not_modify_records() -> None:
    """Compare the recipe before and after grouping."""
    run_record = build_record("lora-seed=3", "lora", 10, seed=3)
    before = copy.deepcopy(run_record.recipe)
    group_runs([run_record])
    assert run_record.recipe == before


def test_metrics_are_means_of_runs_with_outcome_ok() -> None:
    """Check that a diverged run belongs to the group but is in none of its means."""
    runs = [
        build_judged_record("lora-seed=0", "lora", [1.0, 3.0], seed=0, **build_costs(100, 1.0, 10)),
        build_judged_record("lora-seed=1", "lora", [3.0, 5.0], seed=1, **build_costs(300, 2.0, 20)),
        build_judged_record(
            "lora-seed=2", "lora", [9.0, 9.0], seed=2, outcome=Outcome(kind="diverged"), **(build_costs(9, 9.0, 9))
        ),
    ]
    (group,) = group_runs(runs)
    assert (len(group.runs), len(group.ok_runs), group.is_trained) == (3, 2, True)
    assert (group.mean_peak_bytes, group.mean_train_seconds, group.mean_model_flops) == (200, 30.0, 15)
    assert group.step_seconds_range == pytest.approx((0.95, 2.1))
    assert (group.means_by_seed(ROUGE_L), group.means_by_seed(HELD_OUT_LOSS)) == ((2.0, 4.0), ())


def test_mean_is_unknown_if_one_run_lacks_the_value() -> None:
    """Return None, because a mean over some runs would describe another configuration."""
    known = build_costs(100, 1.0, 10)
    unknown = build_record("lora-seed=1", "lora", 10, seed=1, phase_seconds={}, device=known["device"])
    (group,) = group_runs([build_judged_record("lora-seed=0", "lora", draw_scores(3, 0), seed=0, **known), unknown])
    assert (group.mean_peak_bytes, group.mean_train_seconds, group.mean_model_flops, group.step_seconds_range) == (
        None,
        None,
        None,
        None,
    )
    assert group.means_by_seed(HELD_OUT_LOSS) == (3.25,)


def test_baselines_are_not_trained() -> None:
    """Check the untrained base, the lead and full fine-tuning."""
    rows = [
        build_judged_record("b", "zero_shot", [1.0]),
        build_record("l", "lead", None),
        build_record("f", "full", 10),
    ]
    assert [group.is_trained for group in group_runs(rows)] == [False, False, True]
