"""Two suites side by side: known records before and after give exact changes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from peftbench.errors import RecordError
from peftbench.evaluation.intervals import paired_interval
from peftbench.record import Compute, Device, Flops, Interval, Outcome, RunRecord
from peftbench.report.diff.compute import compute_paired_intervals, diff_suites
from peftbench.report.diff.matching import Runs, SettingChange, match_runs
from peftbench.report.diff.metrics import METRICS, parse_thresholds
from peftbench.report.diff.render import regression_summary
from tests.unit.report.records import noise
from tests.unit.report.sides import figures, held, printed, run, scored, suite


def test_every_figure_has_its_exact_change(tmp_path: Path) -> None:
    """Each figure has its values before and after, its change as a share of what it was, and its verdict."""
    new = run(
        loss=3.3475,
        speed=1200.0,
        peak=1100,
        phase_seconds={"train": 12.0},
        energy_joules=42.0,
        flops=Flops(model_flops=100, hardware_flops=180),
        compute=Compute(model_flops_per_second=0.5, peak_flops_per_second=4.0),
    )
    found = figures(held(tmp_path, run(), new))
    told = {name: (f.before, f.after, f.relative_change, f.verdict, f.regressed) for name, f in found.items()}
    assert list(told) == ["outcome", *METRICS]
    same = (31.25, 31.25, 0.0, "equal", False)
    assert told == {
        "outcome": ("ok", "ok", None, "equal", False),
        "held_out_loss": (3.25, 3.3475, 0.03, "within", False),
        "rouge1": same,
        "rouge2": same,
        "rougeL": same,
        "rougeLsum": same,
        "train_seconds": (12.5, 12.0, -0.04, "within", False),
        "tokens_per_second": (1000.0, 1200.0, 0.2, "improved", False),
        "train_peak_bytes": (1000, 1100, 0.1, "regressed", True),
        "model_flops": (100, 100, 0.0, "equal", False),
        "hardware_flops": (200, 180, -0.1, "improved", False),
        "mfu": (0.25, 0.125, -0.5, "regressed", True),
        "train_joules": (40.0, 42.0, 0.05, "within", False),
    }
    assert {f.name for f in found.values() if f.better == "higher"} == {
        "rouge1",
        "rouge2",
        "rougeL",
        "rougeLsum",
        "tokens_per_second",
        "mfu",
    }


@pytest.mark.parametrize(
    ("before", "after", "threshold", "verdict"),
    [
        ({"loss": 1.1}, {"loss": 1.155}, "5", "within"),  # a little more than 5 % in binary fractions
        ({"loss": 1.1}, {"loss": 1.1550001}, "5%", "regressed"),
        ({"loss": 1.1}, {"loss": 1.045}, "5%", "within"),
        ({"loss": 1.1}, {"loss": 1.0449999}, "5%", "improved"),
        ({"speed": 1000.0}, {"speed": 900.0}, "10%", "within"),
        ({"speed": 1000.0}, {"speed": 899.9}, "10%", "regressed"),
        ({"speed": 1000.0}, {"speed": 1100.1}, "10%", "improved"),
        ({"peak": 1000}, {"peak": 1025}, "2.5%", "within"),
        ({"peak": 1000}, {"peak": 1026}, "2.5%", "regressed"),
        ({"peak": 1000}, {"peak": 974}, "2.5%", "improved"),
        ({"peak": 1000}, {"peak": 1001}, "0", "regressed"),
        ({"peak": 1000}, {"peak": 1000}, "0%", "equal"),
        ({"peak": 0}, {"peak": 1}, "1000%", "regressed"),
    ],
)
def test_a_figure_falls_beyond_its_threshold_and_not_at_it(
    before: dict[str, Any], after: dict[str, Any], threshold: str, verdict: str, tmp_path: Path
) -> None:
    """Exactly at the threshold is no fall, just beyond is one, whichever direction is good."""
    name = {"loss": "held_out_loss", "speed": "tokens_per_second", "peak": "train_peak_bytes"}[next(iter(before))]
    pair = held(tmp_path, run(**before), run(**after), f"{name}={threshold}")
    assert figures(pair)[name].verdict == verdict
    assert pair.regressed == (verdict == "regressed")


def test_a_threshold_of_one_figure_goes_before_that_of_all(tmp_path: Path) -> None:
    """The same change falls where its figure's own threshold says so, and not where it does not."""
    sides = run(loss=2.0, speed=100.0), run(loss=2.2, speed=90.0)
    strict, loose = ("held_out_loss=2%", "20%"), ("20", "tokens_per_second=9.99%")
    assert [f.name for f in held(tmp_path, *sides, *strict).metrics if f.regressed] == ["held_out_loss"]
    assert [f.name for f in held(tmp_path, *sides, *loose).metrics if f.regressed] == ["tokens_per_second"]
    assert (
        parse_thresholds([]).for_metric("rougeL")
        == parse_thresholds(["5%"]).for_metric("mfu")
        == parse_thresholds(["5"]).default
    )


def test_a_missing_run_falls_and_a_new_one_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is only before is missing, one that is only after is new."""
    left, right = suite(tmp_path / "A", run("kept"), run("gone")), suite(tmp_path / "B", run("kept"), run("come"))
    found = diff_suites(left, right)
    assert [(pair.before, pair.after, pair.matched_by, pair.regressed) for pair in found.runs] == [
        ("gone", None, None, True),
        ("kept", "kept", "name", False),
        (None, "come", None, False),
    ]
    assert found.regressed
    assert regression_summary(found) == "regressed beyond the threshold: gone (missing in B)"
    text = printed(found, capsys)
    assert "\ngone regressed: run is missing in B\n" in text
    assert "\ncome new in B\n" in text
    shutil.rmtree(left / "gone")
    assert not diff_suites(left, right).regressed


def test_runs_are_matched_by_name_then_recipe_then_path(tmp_path: Path) -> None:
    """A renamed run is found by its recipe, a run of another recipe by its path, and what fits two by neither."""
    names = {"by_name": "1", "old": "2", "place": "3", "twin_1": "t", "twin_2": "t"}
    left = suite(tmp_path / "A", *(run(name, recipe_fingerprint=of) for name, of in names.items()))
    right = tmp_path / "B"
    places = {"elsewhere": ("by_name", "9"), "new": ("new", "2"), "place": ("other", "8"), "twin": ("twin", "t")}
    for place, (name, of) in places.items():
        run(name, recipe_fingerprint=of).write(right / place)
    found = diff_suites(left, right)
    assert {(pair.label, pair.matched_by) for pair in found.runs} == {
        ("by_name", "name"),
        ("old -> new", "recipe"),
        ("place -> other", "path"),
        ("twin_1", None),
        ("twin_2", None),
        ("twin", None),
    }


def test_two_folders_of_one_run_each_are_matched(tmp_path: Path) -> None:
    """The folders of two runs can be compared whatever the runs' names are."""
    run("a").write(tmp_path / "A")
    run("b").write(tmp_path / "B")
    assert [pair.label for pair in diff_suites(tmp_path / "A", tmp_path / "B").runs] == ["a -> b"]


def test_two_records_of_one_name_are_refused(tmp_path: Path) -> None:
    """A folder in which a name stands twice is told with both places."""
    left, right = suite(tmp_path / "A", run()), suite(tmp_path / "B", run())
    run().write(right / "again")
    sentence = f"{right} has two runs named 'lora', in again and lora; run names must be unique"
    with pytest.raises(RecordError, match=re.escape(sentence)):
        diff_suites(left, right)
    with pytest.raises(RecordError, match=re.escape(sentence)):
        diff_suites(right, left)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ("ok", "oom", "regressed"),
        ("ok", "failed", "regressed"),
        ("oom", "ok", "improved"),
        ("oom", "diverged", "changed"),
        ("oom", "oom", "equal"),
    ],
)
def test_an_outcome_is_a_figure(before: Any, after: Any, verdict: str, tmp_path: Path) -> None:
    """From ok to anything else is a fall, to ok a gain; what a run did before it failed is no figure of it."""
    pair = held(tmp_path, run(outcome=Outcome(kind=before)), run(outcome=Outcome(kind=after)))
    outcome, *others = pair.metrics
    assert (outcome.before, outcome.after, outcome.verdict) == (before, after, verdict)
    assert pair.regressed == (verdict == "regressed")
    assert {f.verdict for f in others} == ({"missing"} if before == "ok" else {"new"} if after == "ok" else set())


def test_an_out_of_memory_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the outcome fell, it alone is shown: that the rest is gone goes without saying."""
    left, right = suite(tmp_path / "A", run()), suite(tmp_path / "B", run(outcome=Outcome(kind="oom", step=1)))
    found = diff_suites(left, right)
    assert regression_summary(found) == "regressed beyond the threshold: lora (outcome ok, now oom)"
    text = printed(found, capsys)
    assert "lora outcome ok oom regressed: the run has no metrics without outcome ok" in text
    assert "train_peak_bytes" not in text


def test_a_figure_that_is_known_no_more_falls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A figure that was known and is not, or is no number any more, is said; unknown on both sides it is left out."""
    old = run(flops=Flops())
    left, right = suite(tmp_path / "A", old), suite(tmp_path / "B", run(loss=float("nan"), energy_joules=None))
    found = diff_suites(left, right)
    told = figures(found.runs[0])
    assert {name for name, figure in told.items() if figure.regressed} == {"held_out_loss", "train_joules"}
    assert {name for name, figure in told.items() if figure.verdict == "new"} == {"model_flops", "hardware_flops"}
    assert "lora held_out_loss 3.2500 unknown regressed: no longer known" in printed(found, capsys)
    assert regression_summary(found).endswith("lora (held_out_loss no longer known; train_joules no longer known)")
    assert json.loads(found.model_dump_json())["runs"][0]["metrics"][1]["after"] is None
    assert "model_flops" not in figures(held(tmp_path, old, old))


def test_config_is_compared_knob_by_knob(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nested knobs, ones of one side, lists and what a run was made with are named; name and folder are not."""

    def made(name: str, recipe: dict[str, Any], **changes: Any) -> RunRecord:
        one = run(name, **changes)
        data = one.recipe["data"] | recipe.pop("data")
        return one.model_copy(update={"recipe": one.recipe | recipe | {"data": data}})

    source: dict[str, Any] = {"kind": "files", "options": {"columns": ["a", "b"], "strict": 1}}
    old = made("x", {"data": {"source": source}, "save_model": False}, library_versions={"torch": "1", "peft": "3"})
    source = {"kind": "files", "options": {"columns": ["a", "c"], "strict": True}, "split": None}
    new = made(
        "x",
        {"data": {"source": source}, "save_model": 0, "output_dir": "elsewhere"},
        library_versions={"torch": "2", "peft": "3"},
        git_commit="abc",
        data_fingerprint="d",
    )
    pair = held(tmp_path, old, new)
    assert list(pair.config_changes) == [
        SettingChange(key="data.source.options.columns", before=["a", "b"], after=["a", "c"]),
        SettingChange(key="data.source.options.strict", before=1, after=True),
        SettingChange(key="save_model", before=False, after=0),
        SettingChange(key="data.source.split", only_in="B"),
        SettingChange(key="library_versions.torch", before="1", after="2"),
        SettingChange(key="git_commit", before=None, after="abc"),
        SettingChange(key="data_fingerprint", before=None, after="d"),
    ]
    text = printed(diff_suites(tmp_path / "A", tmp_path / "B"), capsys)
    assert 'data.source.options.columns ["a", "b"] ["a", "c"] all' in text
    assert "data.source.split not set null all" in text
    assert "no metric changed" in text


def test_what_changed_in_all_runs_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Changes that all runs share come first and once, others with the runs that have them."""
    left = suite(tmp_path / "A", *(run(name, library_versions={"torch": "1"}) for name in ("a", "b", "c")))
    right = suite(
        tmp_path / "B",
        *(
            run(name, library_versions={"torch": "2"}, global_batch_size=batch, seed=seed)
            for name, batch, seed in (("a", 16, 0), ("b", 32, 0), ("c", 32, 7))
        ),
    )
    found = diff_suites(left, right)
    assert [change.key for change in found.common_changes] == ["library_versions.torch"]
    table = printed(found, capsys).split("changed settings")[1]
    assert re.findall(r"^(\S+ \S+ \S+ .+)$", table, re.MULTILINE)[1:4] == [
        "library_versions.torch 1 2 all",
        "train.global_batch_size 16 32 b, c",
        "train.seed 0 7 c",
    ]


def test_two_machines_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a device differs the top says so, and figures of time are compared all the same."""
    card = Device(type="cuda", name="a GPU", num_processes=1)
    left, right = suite(tmp_path / "A", run()), suite(tmp_path / "B", run(device=card, speed=10.0))
    found = diff_suites(left, right)
    assert found.different_devices
    assert figures(found.runs[0])["tokens_per_second"].regressed
    assert SettingChange(key="device.name", before="a CPU", after="a GPU") in found.common_changes
    *_, line = printed(found, capsys).split("changed settings")[0].splitlines()
    assert line == "times and memory are from different devices: A ran on a CPU (cpu), B on a GPU (cuda)"
    assert not diff_suites(left, left).different_devices
    assert "different devices" not in printed(diff_suites(left, left), capsys)


def test_a_change_that_the_examples_support(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each example lost two points: the interval has no width, leaves zero out, and the sentence says so."""
    left = suite(tmp_path / "A", scored((10.0, 20.0, 60.0) * 7))
    right = suite(tmp_path / "B", scored((8.0, 18.0, 58.0) * 7))
    found = diff_suites(left, right)
    figure = figures(found.runs[0])["rougeL"]
    assert figure.paired_interval is not None
    assert figure.paired_interval.interval == Interval(mean=-2, low=-2, high=-2)
    assert figure.paired_interval.significant is True
    assert regression_summary(found).endswith("lora (rougeL -6.67%, significant)")
    assert "-6.67% (-2 to -2) regressed by more than 5%, significant" in printed(found, capsys)


def test_a_change_that_the_examples_do_not_support(tmp_path: Path) -> None:
    """A mean that fell by the chance of one example falls, and the sentence says that the interval has zero in it."""
    left, right = scored((10.0, 10.0, 60.0, 10.0) * 5), scored((14.0, 13.0, 30.0, 14.0) * 5)
    pair = held(tmp_path, left, right)
    figure = figures(pair)["rougeL"]
    assert figure.paired_interval is not None
    assert figure.paired_interval.interval is not None
    assert figure.paired_interval.interval.low < 0 < figure.paired_interval.interval.high
    assert figure.paired_interval.significant is False
    sentence = regression_summary(diff_suites(tmp_path / "A", tmp_path / "B"))
    assert sentence.endswith("lora (rougeL -21.1%, not significant)")


def test_a_loss_is_weighed_by_its_tokens(tmp_path: Path) -> None:
    """The interval's mean is the difference of the two losses, which are of tokens and not of examples."""
    old = scored((1.0, 1.0), (3.0, 10.0), labelled=(1, 9), loss=1.3)
    new = scored((1.0, 1.0), (5.0, 12.0), labelled=(1, 9), loss=1.7)
    paired = figures(held(tmp_path, old, new))["held_out_loss"].paired_interval
    assert paired is not None
    assert paired.interval is not None
    assert paired.interval.mean == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"identity": "other"}, "they were not evaluated on the same examples"),
        ({"labelled": (1, 8)}, "their summaries are not of the same tokens"),
        ({"labelled": ()}, "not both records have the scores of each example"),
        ({"losses": (1.0, float("inf"))}, "not both records have the scores of each example"),
        ({"losses": ()}, "not both records have the scores of each example"),
    ],
)
def test_scores_that_cannot_be_paired(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """Where examples, tokens or scores are not the same there is no interval, and the reason is told."""
    scores: dict[str, Any] = {"losses": (3.0, 10.0), "labelled": (1, 9)}
    pair = held(tmp_path, scored((1.0, 1.0), **scores), scored((1.0, 1.0), **(scores | changes), loss=4.0))
    figure = figures(pair)["held_out_loss"]
    assert figure.paired_interval is not None
    assert (figure.paired_interval.interval, figure.paired_interval.significant) == (None, None)
    assert figure.paired_interval.missing_reason == reason
    sentence = regression_summary(diff_suites(tmp_path / "A", tmp_path / "B"))
    assert sentence.endswith("lora (held_out_loss +23.1%, no interval)")


@pytest.mark.parametrize("count", [1, 2, 19])
def test_few_examples_support_nothing(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one example there is no interval, and of fewer than twenty none supports anything, however narrow it is."""
    sides = suite(tmp_path / "A", scored((10.0,) * count)), suite(tmp_path / "B", scored((8.0,) * count))
    found = diff_suites(*sides)
    paired = figures(found.runs[0])["rougeL"].paired_interval
    assert paired is not None
    assert paired.significant is None
    assert paired.missing_reason == ("too few examples" if count == 1 else None)
    assert (paired.interval is None) == (count == 1)
    why = "no interval" if count == 1 else "too few examples to support it"
    assert regression_summary(found).endswith(f"lora (rougeL -20%, {why})")
    said = printed(found, capsys)
    assert ("no interval: too few examples" in said) == (count == 1)
    assert ("; of fewer than 20 examples none is supported" in said) == (count > 1)


def test_intervals_are_corrected_for_how_many_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four runs with one such figure each are four intervals of 1 - 0.05 / 4; by hand, over the same examples."""
    before, after = noise(60, 0), [noise(60, seed) for seed in range(1, 5)]
    old = [scored(tuple(before)).model_copy(update={"name": f"r{i}"}) for i in range(4)]
    new = [scored(tuple(one)).model_copy(update={"name": f"r{i}"}) for i, one in enumerate(after)]
    found = diff_suites(suite(tmp_path / "A", *old), suite(tmp_path / "B", *new))
    for pair, late in zip(found.runs, after, strict=True):
        paired = figures(pair)["rougeL"].paired_interval
        expected = paired_interval([b - a for a, b in zip(before, late, strict=True)], confidence=1 - 0.05 / 4)
        assert paired is not None
        assert paired.interval is not None
        assert (paired.interval.low, paired.interval.high) == pytest.approx((expected.low, expected.high))
    said = "paired over examples; all 4 hold together with 95 %, and they know nothing of seeds"
    assert said in printed(found, capsys)


def test_chance_supports_a_change_as_seldom_as_is_said(tmp_path: Path) -> None:
    """Of 60 comparisons of ten runs that do not differ, some 5 % have a supported change; uncorrected some 40 %."""
    wrong = 0
    for draw in range(60):
        names = [f"r{i}" for i in range(10)]
        sides = [
            Runs(
                tmp_path,
                {
                    name: scored(tuple(noise(40, 1000 * draw + 100 * side + i))).model_copy(update={"name": name})
                    for i, name in enumerate(names)
                },
            )
            for side in range(2)
        ]
        wrong += any(one["rougeL"].significant for one in compute_paired_intervals(match_runs(*sides)))
    assert wrong <= 9
