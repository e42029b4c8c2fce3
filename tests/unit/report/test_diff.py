"""Comparison of two suites: known records before and after give exact changes."""

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
from peftbench.report.diff.metrics import list_compared_metrics, parse_thresholds
from peftbench.report.diff.render import regression_summary
from tests.unit.report.records import draw_scores
from tests.unit.report.suites import (
    build_run,
    build_scored_run,
    capture_printed,
    compare_runs,
    metrics_by_name,
    write_suite,
)


def test_every_metric_has_its_exact_change(tmp_path: Path) -> None:
    """Check each metric's values before and after, its relative change and its verdict."""
    new = build_run(
        loss=3.3475,
        speed=1200.0,
        peak=1100,
        phase_seconds={"train": 12.0},
        energy_joules=42.0,
        flops=Flops(model_flops=100, hardware_flops=180),
        compute=Compute(model_flops_per_second=0.5, peak_flops_per_second=4.0),
    )
    metrics = metrics_by_name(compare_runs(tmp_path, build_run(), new))
    changes = {name: (m.before, m.after, m.relative_change, m.verdict, m.regressed) for name, m in metrics.items()}
    assert list(changes) == ["outcome", *list_compared_metrics([new])]
    unchanged = (31.25, 31.25, 0.0, "equal", False)
    assert changes == {
        "outcome": ("ok", "ok", None, "equal", False),
        "held_out_loss": (3.25, 3.3475, 0.03, "within", False),
        "rouge1": unchanged,
        "rouge2": unchanged,
        "rougeL": unchanged,
        "rougeLsum": unchanged,
        "train_seconds": (12.5, 12.0, -0.04, "within", False),
        "tokens_per_second": (1000.0, 1200.0, 0.2, "improved", False),
        "train_peak_bytes": (1000, 1100, 0.1, "regressed", True),
        "model_flops": (100, 100, 0.0, "equal", False),
        "hardware_flops": (200, 180, -0.1, "improved", False),
        "mfu": (0.25, 0.125, -0.5, "regressed", True),
        "train_joules": (40.0, 42.0, 0.05, "within", False),
    }
    assert {metric.name for metric in metrics.values() if metric.better == "higher"} == {
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
        ({"loss": 1.1}, {"loss": 1.155}, "5", "within"),  # slightly more than 5 % in floating point
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
def test_metric_regresses_only_beyond_its_threshold(
    before: dict[str, Any], after: dict[str, Any], threshold: str, verdict: str, tmp_path: Path
) -> None:
    """Check that a change equal to the threshold is not a regression, whether higher or lower is better."""
    name = {"loss": "held_out_loss", "speed": "tokens_per_second", "peak": "train_peak_bytes"}[next(iter(before))]
    pair = compare_runs(tmp_path, build_run(**before), build_run(**after), f"{name}={threshold}")
    assert metrics_by_name(pair)[name].verdict == verdict
    assert pair.regressed == (verdict == "regressed")


def test_threshold_of_a_metric_overrides_the_default(tmp_path: Path) -> None:
    """Check that a change regresses only if it exceeds its metric's threshold or, without one, the default."""
    runs = build_run(loss=2.0, speed=100.0), build_run(loss=2.2, speed=90.0)
    strict, loose = ("held_out_loss=2%", "20%"), ("20", "tokens_per_second=9.99%")
    assert [m.name for m in compare_runs(tmp_path, *runs, *strict).metrics if m.regressed] == ["held_out_loss"]
    assert [m.name for m in compare_runs(tmp_path, *runs, *loose).metrics if m.regressed] == ["tokens_per_second"]
    assert (
        parse_thresholds([]).for_metric("rougeL")
        == parse_thresholds(["5%"]).for_metric("mfu")
        == parse_thresholds(["5"]).default
    )


def test_missing_run_regresses_and_new_run_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a run only in A is missing and a run only in B is new."""
    left, right = (
        write_suite(tmp_path / "A", build_run("kept"), build_run("gone")),
        write_suite(tmp_path / "B", build_run("kept"), build_run("come")),
    )
    diff = diff_suites(left, right)
    assert [(pair.before, pair.after, pair.matched_by, pair.regressed) for pair in diff.runs] == [
        ("gone", None, None, True),
        ("kept", "kept", "name", False),
        (None, "come", None, False),
    ]
    assert diff.regressed
    assert regression_summary(diff) == "regressed beyond the threshold: gone (missing in B)"
    text = capture_printed(diff, capsys)
    assert "\ngone regressed: run is missing in B\n" in text
    assert "\ncome new in B\n" in text
    shutil.rmtree(left / "gone")
    assert not diff_suites(left, right).regressed


def test_runs_are_matched_by_name_then_recipe_then_path(tmp_path: Path) -> None:
    """Match a renamed run by its recipe and a run of another recipe by its path; leave ambiguous runs unmatched."""
    fingerprints = {"by_name": "1", "old": "2", "place": "3", "twin_1": "t", "twin_2": "t"}
    left = write_suite(tmp_path / "A", *(build_run(name, recipe_fingerprint=f) for name, f in fingerprints.items()))
    right = tmp_path / "B"
    runs_by_path = {"elsewhere": ("by_name", "9"), "new": ("new", "2"), "place": ("other", "8"), "twin": ("twin", "t")}
    for path, (name, fingerprint) in runs_by_path.items():
        build_run(name, recipe_fingerprint=fingerprint).write(right / path)
    diff = diff_suites(left, right)
    assert {(pair.label, pair.matched_by) for pair in diff.runs} == {
        ("by_name", "name"),
        ("old -> new", "recipe"),
        ("place -> other", "path"),
        ("twin_1", None),
        ("twin_2", None),
        ("twin", None),
    }


def test_folders_with_one_run_each_are_matched(tmp_path: Path) -> None:
    """Match the single runs of two folders although their names differ."""
    build_run("a").write(tmp_path / "A")
    build_run("b").write(tmp_path / "B")
    assert [pair.label for pair in diff_suites(tmp_path / "A", tmp_path / "B").runs] == ["a -> b"]


def test_duplicate_run_name_is_refused(tmp_path: Path) -> None:
    """Check that the error message names both folders."""
    left, right = write_suite(tmp_path / "A", build_run()), write_suite(tmp_path / "B", build_run())
    build_run().write(right / "again")
    message = f"{right} has two runs named 'lora', in again and lora; run names must be unique"
    with pytest.raises(RecordError, match=re.escape(message)):
        diff_suites(left, right)
    with pytest.raises(RecordError, match=re.escape(message)):
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
def test_outcome_is_compared_like_a_metric(before: Any, after: Any, verdict: str, tmp_path: Path) -> None:
    """Check that a change from ok regresses and a change to ok improves; a failed run has no other metrics."""
    pair = compare_runs(tmp_path, build_run(outcome=Outcome(kind=before)), build_run(outcome=Outcome(kind=after)))
    outcome, *others = pair.metrics
    assert (outcome.before, outcome.after, outcome.verdict) == (before, after, verdict)
    assert pair.regressed == (verdict == "regressed")
    assert {metric.verdict for metric in others} == (
        {"missing"} if before == "ok" else {"new"} if after == "ok" else set()
    )


def test_oom_is_reported_in_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Print only the outcome if it regressed, and no row for each missing metric."""
    left, right = (
        write_suite(tmp_path / "A", build_run()),
        write_suite(tmp_path / "B", build_run(outcome=Outcome(kind="oom", step=1))),
    )
    diff = diff_suites(left, right)
    assert regression_summary(diff) == "regressed beyond the threshold: lora (outcome ok, now oom)"
    text = capture_printed(diff, capsys)
    assert "lora outcome ok oom regressed: the run has no metrics without outcome ok" in text
    assert "train_peak_bytes" not in text


def test_metric_no_longer_known_regresses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a metric that became unknown or NaN regresses, and that one unknown on both sides is left out."""
    old = build_run(flops=Flops())
    left, right = (
        write_suite(tmp_path / "A", old),
        write_suite(tmp_path / "B", build_run(loss=float("nan"), energy_joules=None)),
    )
    diff = diff_suites(left, right)
    metrics = metrics_by_name(diff.runs[0])
    assert {name for name, metric in metrics.items() if metric.regressed} == {"held_out_loss", "train_joules"}
    assert {name for name, metric in metrics.items() if metric.verdict == "new"} == {"model_flops", "hardware_flops"}
    assert "lora held_out_loss 3.2500 unknown regressed: no longer known" in capture_printed(diff, capsys)
    assert regression_summary(diff).endswith("lora (held_out_loss no longer known; train_joules no longer known)")
    assert json.loads(diff.model_dump_json())["runs"][0]["metrics"][1]["after"] is None
    assert "model_flops" not in metrics_by_name(compare_runs(tmp_path, old, old))


def test_config_is_compared_key_by_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compare nested keys, keys of one side, lists, versions, commit and data, but not name and output_dir."""

    def build_with_recipe(name: str, recipe: dict[str, Any], **changes: Any) -> RunRecord:
        base = build_run(name, **changes)
        data = base.recipe["data"] | recipe.pop("data")
        return base.model_copy(update={"recipe": base.recipe | recipe | {"data": data}})

    source: dict[str, Any] = {"kind": "files", "options": {"columns": ["a", "b"], "strict": 1}}
    old = build_with_recipe(
        "x", {"data": {"source": source}, "save_model": False}, library_versions={"torch": "1", "peft": "3"}
    )
    source = {"kind": "files", "options": {"columns": ["a", "c"], "strict": True}, "split": None}
    new = build_with_recipe(
        "x",
        {"data": {"source": source}, "save_model": 0, "output_dir": "elsewhere"},
        library_versions={"torch": "2", "peft": "3"},
        git_commit="abc",
        data_fingerprint="d",
    )
    pair = compare_runs(tmp_path, old, new)
    assert list(pair.config_changes) == [
        SettingChange(key="data.source.options.columns", before=["a", "b"], after=["a", "c"]),
        SettingChange(key="data.source.options.strict", before=1, after=True),
        SettingChange(key="save_model", before=False, after=0),
        SettingChange(key="data.source.split", only_in="B"),
        SettingChange(key="library_versions.torch", before="1", after="2"),
        SettingChange(key="git_commit", before=None, after="abc"),
        SettingChange(key="data_fingerprint", before=None, after="d"),
    ]
    text = capture_printed(diff_suites(tmp_path / "A", tmp_path / "B"), capsys)
    assert 'data.source.options.columns ["a", "b"] ["a", "c"] all' in text
    assert "data.source.split not set null all" in text
    assert "no metric changed" in text


def test_change_shared_by_all_runs_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """List changes that all runs share first and once, then other changes with the names of their runs."""
    left = write_suite(tmp_path / "A", *(build_run(name, library_versions={"torch": "1"}) for name in ("a", "b", "c")))
    right = write_suite(
        tmp_path / "B",
        *(
            build_run(name, library_versions={"torch": "2"}, global_batch_size=batch, seed=seed)
            for name, batch, seed in (("a", 16, 0), ("b", 32, 0), ("c", 32, 7))
        ),
    )
    diff = diff_suites(left, right)
    assert [change.key for change in diff.common_changes] == ["library_versions.torch"]
    table = capture_printed(diff, capsys).split("changed settings")[1]
    assert re.findall(r"^(\S+ \S+ \S+ .+)$", table, re.MULTILINE)[1:4] == [
        "library_versions.torch 1 2 all",
        "train.global_batch_size 16 32 b, c",
        "train.seed 0 7 c",
    ]


def test_different_devices_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Name both devices above the tables, and still compare times."""
    gpu = Device(type="cuda", name="a GPU", num_processes=1)
    left, right = (
        write_suite(tmp_path / "A", build_run()),
        write_suite(tmp_path / "B", build_run(device=gpu, speed=10.0)),
    )
    diff = diff_suites(left, right)
    assert diff.different_devices
    assert metrics_by_name(diff.runs[0])["tokens_per_second"].regressed
    assert SettingChange(key="device.name", before="a CPU", after="a GPU") in diff.common_changes
    *_, line = capture_printed(diff, capsys).split("changed settings")[0].splitlines()
    assert line == "times and memory are from different devices: A ran on a CPU (cpu), B on a GPU (cuda)"
    assert not diff_suites(left, left).different_devices
    assert "different devices" not in capture_printed(diff_suites(left, left), capsys)


def test_equal_change_on_every_example_is_significant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lower each example's score by two points, so that the interval has no width and excludes zero."""
    left = write_suite(tmp_path / "A", build_scored_run((10.0, 20.0, 60.0) * 7))
    right = write_suite(tmp_path / "B", build_scored_run((8.0, 18.0, 58.0) * 7))
    diff = diff_suites(left, right)
    metric = metrics_by_name(diff.runs[0])["rougeL"]
    assert metric.paired_interval is not None
    assert metric.paired_interval.interval == Interval(mean=-2, low=-2, high=-2)
    assert metric.paired_interval.significant is True
    assert regression_summary(diff).endswith("lora (rougeL -6.67%, significant)")
    assert "-6.67% (-2 to -2) regressed by more than 5%, significant" in capture_printed(diff, capsys)


def test_change_within_sampling_noise_is_not_significant(tmp_path: Path) -> None:
    """Check that a lower mean regresses, but is reported as not significant if its interval contains zero."""
    left, right = build_scored_run((10.0, 10.0, 60.0, 10.0) * 5), build_scored_run((14.0, 13.0, 30.0, 14.0) * 5)
    pair = compare_runs(tmp_path, left, right)
    metric = metrics_by_name(pair)["rougeL"]
    assert metric.paired_interval is not None
    assert metric.paired_interval.interval is not None
    assert metric.paired_interval.interval.low < 0 < metric.paired_interval.interval.high
    assert metric.paired_interval.significant is False
    message = regression_summary(diff_suites(tmp_path / "A", tmp_path / "B"))
    assert message.endswith("lora (rougeL -21.1%, not significant)")


def test_loss_interval_is_weighted_by_tokens(tmp_path: Path) -> None:
    """Check that the interval's mean is the difference of the two losses, which are means over tokens."""
    old = build_scored_run((1.0, 1.0), (3.0, 10.0), labeled=(1, 9), loss=1.3)
    new = build_scored_run((1.0, 1.0), (5.0, 12.0), labeled=(1, 9), loss=1.7)
    paired = metrics_by_name(compare_runs(tmp_path, old, new))["held_out_loss"].paired_interval
    assert paired is not None
    assert paired.interval is not None
    assert paired.interval.mean == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"identity": "other"}, "the runs were not evaluated on the same examples"),
        ({"labeled": (1, 8)}, "the labeled texts have different tokens"),
        ({"labeled": ()}, "per-example scores are missing in at least one record"),
        ({"losses": (1.0, float("inf"))}, "per-example scores are missing in at least one record"),
        ({"losses": ()}, "per-example scores are missing in at least one record"),
    ],
)
def test_unpairable_scores_have_no_interval(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """Check that different examples, tokens or missing scores give no interval, and that the reason is recorded."""
    scores: dict[str, Any] = {"losses": (3.0, 10.0), "labeled": (1, 9)}
    pair = compare_runs(
        tmp_path, build_scored_run((1.0, 1.0), **scores), build_scored_run((1.0, 1.0), **(scores | changes), loss=4.0)
    )
    metric = metrics_by_name(pair)["held_out_loss"]
    assert metric.paired_interval is not None
    assert (metric.paired_interval.interval, metric.paired_interval.significant) == (None, None)
    assert metric.paired_interval.missing_reason == reason
    message = regression_summary(diff_suites(tmp_path / "A", tmp_path / "B"))
    assert message.endswith("lora (held_out_loss +23.1%, no interval)")


@pytest.mark.parametrize("count", [1, 2, 19])
def test_few_examples_are_never_significant(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that one example has no interval, and that an interval over fewer than 20 is never significant."""
    suites = (
        write_suite(tmp_path / "A", build_scored_run((10.0,) * count)),
        write_suite(tmp_path / "B", build_scored_run((8.0,) * count)),
    )
    diff = diff_suites(*suites)
    paired = metrics_by_name(diff.runs[0])["rougeL"].paired_interval
    assert paired is not None
    assert paired.significant is None
    assert paired.missing_reason == ("too few examples" if count == 1 else None)
    assert (paired.interval is None) == (count == 1)
    reason = "no interval" if count == 1 else "too few examples"
    assert regression_summary(diff).endswith(f"lora (rougeL -20%, {reason})")
    output = capture_printed(diff, capsys)
    assert ("no interval: too few examples" in output) == (count == 1)
    assert ("; with fewer than 20 examples no change is called significant" in output) == (count > 1)


def test_intervals_are_corrected_for_their_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compare the intervals of four runs with paired intervals of confidence 1 - 0.05 / 4."""
    before, after = draw_scores(60, 0), [draw_scores(60, seed) for seed in range(1, 5)]
    old = [build_scored_run(tuple(before)).model_copy(update={"name": f"r{i}"}) for i in range(4)]
    new = [build_scored_run(tuple(scores)).model_copy(update={"name": f"r{i}"}) for i, scores in enumerate(after)]
    diff = diff_suites(write_suite(tmp_path / "A", *old), write_suite(tmp_path / "B", *new))
    for pair, scores in zip(diff.runs, after, strict=True):
        paired = metrics_by_name(pair)["rougeL"].paired_interval
        expected = paired_interval([b - a for a, b in zip(before, scores, strict=True)], confidence=1 - 0.05 / 4)
        assert paired is not None
        assert paired.interval is not None
        assert (paired.interval.low, paired.interval.high) == pytest.approx((expected.low, expected.high))
    note = (
        "paired over examples, with 95 % confidence for all 4 simultaneously; "
        "it does not include the variation between seeds"
    )
    assert note in capture_printed(diff, capsys)


def test_false_positives_stay_within_stated_level(tmp_path: Path) -> None:
    """Compare ten runs with equal true scores 60 times: about 5 % differ significantly; uncorrected, about 40 %."""
    false_positives = 0
    for draw in range(60):
        names = [f"r{i}" for i in range(10)]
        suites = [
            Runs(
                tmp_path,
                {
                    name: build_scored_run(tuple(draw_scores(40, 1000 * draw + 100 * side + i))).model_copy(
                        update={"name": name}
                    )
                    for i, name in enumerate(names)
                },
            )
            for side in range(2)
        ]
        metrics = list_compared_metrics(list(suites[0].by_path.values()))
        intervals = compute_paired_intervals(match_runs(*suites), metrics)
        false_positives += any(by_metric["rougeL"].significant for by_metric in intervals)
    assert false_positives <= 9
