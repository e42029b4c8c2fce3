"""Runs that differ in seeds alone stand together, under the name they share."""

from __future__ import annotations

import copy

import pytest

from peftbench.record import Outcome
from peftbench.report.configurations import configurations
from tests.report.records import costly, judged, noise, record


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
    (one,) = configurations([record(name, "lora", 10, seed=seed) for seed, name in enumerate(names)])
    assert (one.label, one.kind, len(one.runs)) == (label, "lora", len(names))


def test_labels_are_told_apart() -> None:
    """Two recipes whose runs have one name are two configurations with a label each."""
    found = configurations([record("lora", "lora", 10), record("lora", "lora", 10, global_batch=2)])
    assert [one.label for one in found] == ["lora", "lora #2"]


def test_records_stay_as_they_are() -> None:
    """Grouping looks at recipes and changes none."""
    there = record("lora-seed=3", "lora", 10, seed=3)
    before = copy.deepcopy(there.recipe)
    configurations([there])
    assert there.recipe == before


def test_figures_are_means_of_the_runs_that_ended_well() -> None:
    """By hand: of 100 and 300 bytes 200; a run that did not end well is in no figure, but is a run."""
    runs = [
        judged("lora-seed=0", "lora", [1.0, 3.0], seed=0, **costly(100, 1.0, 10)),
        judged("lora-seed=1", "lora", [3.0, 5.0], seed=1, **costly(300, 2.0, 20)),
        judged("lora-seed=2", "lora", [9.0, 9.0], seed=2, outcome=Outcome(kind="diverged"), **(costly(9, 9.0, 9))),
    ]
    (one,) = configurations(runs)
    assert (len(one.runs), len(one.ok), one.trains) == (3, 2, True)
    assert (one.peak_bytes, one.train_seconds, one.required_flops) == (200, 30.0, 15)
    assert one.step_seconds == pytest.approx((0.95, 2.1))
    assert (one.rouge_l, one.losses) == ((2.0, 4.0), ())


def test_what_one_run_does_not_tell_is_unknown() -> None:
    """A mean over some runs alone would be another configuration's figure."""
    known, unknown = costly(100, 1.0, 10), record("lora-seed=1", "lora", 10, seed=1, phase_seconds={})
    (one,) = configurations([judged("lora-seed=0", "lora", noise(3, 0), seed=0, **known), unknown])
    assert (one.peak_bytes, one.train_seconds, one.required_flops, one.step_seconds) == (None, None, None, None)
    assert one.losses == (3.25,)


def test_baselines_train_nothing() -> None:
    """Neither the untrained base nor the lead has a trained parameter; full fine-tuning has."""
    rows = [judged("b", "zero_shot", [1.0]), record("l", "lead", None), record("f", "full", 10)]
    assert [one.trains for one in configurations(rows)] == [False, False, True]
