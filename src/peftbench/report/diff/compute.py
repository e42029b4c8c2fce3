"""Two suites side by side, before and after or on two machines: what changed in config, and what in figures.

Data alone; ``beside_text`` is what a person reads of it. Shares are of what a figure was before: 0.05 is five percent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from peftbench.common.schema import RecordModel
from peftbench.evaluation.intervals import paired_intervals
from peftbench.record import Interval, PerExample, RunRecord
from peftbench.report.analysis.significance import MIN_EXAMPLES, bonferroni_confidence
from peftbench.report.diff.matching import Match, MatchedBy, Runs, SettingChange, diff_settings, match_runs
from peftbench.report.diff.metrics import LOSS_METRIC, METRICS, OUTCOME_METRIC, Metric, Thresholds, metric_value

DiffVerdict = Literal["regressed", "improved", "within", "equal", "missing", "not_reported", "new", "changed"]
"""Of a figure: worse or better by more than its threshold, by less, the same; known no more, or not told by the other
device, or known only now (these two are neither good nor bad); of an outcome, another that is not "ok" either.
"""


class PairedInterval(RecordModel):
    """What the examples say of a change in quality."""

    interval: Interval | None = None
    """Of the mean difference, after less before, in the figure's unit: paired, over examples.

    All intervals of the comparison hold together with 95 %.
    """
    significant: bool | None = None
    """Whether the interval leaves zero out; None where there is no interval, and of fewer than 20 examples."""
    missing_reason: str | None = None
    """Why there is no interval."""


class MetricDiff(RecordModel):
    """One figure of a run, before and after."""

    name: str
    unit: str
    better: Literal["higher", "lower", "ok"]
    """Which direction is good; of an outcome, which value."""
    before: int | float | str | None
    after: int | float | str | None
    relative_change: float | None = None
    """As a share of ``before``; None where a figure is unknown, was zero or is no number."""
    threshold: float | None = None
    """By which share it may be worse."""
    verdict: DiffVerdict
    regressed: bool
    """Worse by more than the threshold, or known no more."""
    paired_interval: PairedInterval | None = None
    """Of a quality figure that is known before and after."""


class RunDiff(RecordModel):
    """One run in both folders, or in one of them."""

    before: str | None
    """Its name there; None where it is new."""
    after: str | None
    """Its name there; None where it is missing, which is a fall."""
    matched_by: MatchedBy | None
    config_changes: tuple[SettingChange, ...] = ()
    """What changed, name and output_dir left out."""
    metrics: tuple[MetricDiff, ...] = ()
    """The outcome, and what is known of it on either side."""
    regressed: bool
    """It is missing, or one of its figures fell."""

    @property
    def label(self) -> str:
        """The run's name, or both where it has two."""
        names = dict.fromkeys(name for name in (self.before, self.after) if name is not None)
        return " -> ".join(names)


class SuiteSide(RecordModel):
    """One of the two folders."""

    folder: str
    num_runs: int
    devices: tuple[str, ...]
    """Where its runs that are in both folders were made, as "a CPU (cpu)"."""


class SuiteDiff(RecordModel):
    """Two folders side by side."""

    before: SuiteSide
    """A."""
    after: SuiteSide
    """B."""
    different_devices: bool
    """Some run was made on another device than before, so that its times and memory are of two."""
    common_changes: tuple[SettingChange, ...]
    """What changed alike in all runs that are in both; it is in each pair's ``config`` too."""
    runs: tuple[RunDiff, ...]
    regressed: bool
    """Some run did."""
    changed: bool
    """Anything at all is not what it was."""


def diff_suites(before: Path, after: Path, thresholds: Thresholds | None = None) -> SuiteDiff:
    """Hold the records below two folders against each other, run by run.

    Raises:
        RecordError: a folder has no records, one cannot be read, or two of a folder are of one name.
    """
    limits = thresholds or Thresholds()
    left, right = Runs.load(before), Runs.load(after)
    matches = match_runs(left, right)
    pairs = tuple(
        _diff_run(match, limits, paired)
        for match, paired in zip(matches, compute_paired_intervals(matches), strict=True)
    )
    both = [(match.before, match.after) for match in matches if match.before and match.after]
    return SuiteDiff(
        before=_build_side(left, [old for old, _ in both]),
        after=_build_side(right, [new for _, new in both]),
        different_devices=any(_device_label(old) != _device_label(new) for old, new in both),
        common_changes=_common_changes([pair for pair in pairs if pair.matched_by]),
        runs=pairs,
        regressed=any(pair.regressed for pair in pairs),
        changed=any(
            pair.matched_by is None or pair.config_changes or any(figure.verdict != "equal" for figure in pair.metrics)
            for pair in pairs
        ),
    )


def _build_side(runs: Runs, records: Sequence[RunRecord]) -> SuiteSide:
    devices = tuple(dict.fromkeys(_device_label(record) for record in records))
    return SuiteSide(folder=str(runs.folder), num_runs=len(runs.by_path), devices=devices)


def _device_label(record: RunRecord) -> str:
    return f"{record.device.name or 'a device without a name'} ({record.device.type})"


def _common_changes(run_diffs: Sequence[RunDiff]) -> tuple[SettingChange, ...]:
    """As JSON they are compared, for which true is not 1."""
    others = [{change.model_dump_json() for change in pair.config_changes} for pair in run_diffs[1:]]
    first = run_diffs[0].config_changes if run_diffs else ()
    return tuple(change for change in first if all(change.model_dump_json() in other for other in others))


def _diff_run(match: Match, thresholds: Thresholds, intervals: Mapping[str, PairedInterval]) -> RunDiff:
    old, new = match.before, match.after
    names = (old.name if old else None, new.name if new else None)
    if old is None or new is None:
        return RunDiff(before=names[0], after=names[1], matched_by=None, regressed=new is None)
    figures = _diff_metrics(old, new, thresholds, intervals)
    return RunDiff(
        before=names[0],
        after=names[1],
        matched_by=match.matched_by,
        config_changes=diff_settings(old, new),
        metrics=figures,
        regressed=any(figure.regressed for figure in figures),
    )


def _diff_metrics(
    before: RunRecord, after: RunRecord, thresholds: Thresholds, intervals: Mapping[str, PairedInterval]
) -> tuple[MetricDiff, ...]:
    """The outcome, then every figure that is known before or after."""
    known = [
        _diff_metric(kind, before, after, thresholds.for_metric(name), intervals.get(name))
        for name, kind in METRICS.items()
    ]
    return (_diff_outcome(before, after), *(figure for figure in known if figure is not None))


def _diff_outcome(before: RunRecord, after: RunRecord) -> MetricDiff:
    old, new = before.outcome.kind, after.outcome.kind
    verdict: DiffVerdict = (
        "equal" if old == new else "regressed" if old == "ok" else "improved" if new == "ok" else "changed"
    )
    return MetricDiff(
        name=OUTCOME_METRIC,
        unit="",
        better="ok",
        before=old,
        after=new,
        verdict=verdict,
        regressed=verdict == "regressed",
    )


def _diff_metric(
    metric: Metric, before: RunRecord, after: RunRecord, threshold: Fraction, paired_interval: PairedInterval | None
) -> MetricDiff | None:
    old, new = metric_value(metric, before), metric_value(metric, after)
    if old is None and new is None:
        return None
    change, verdict = _classify_change(metric, old, new, threshold)
    if verdict == "missing" and metric.device_dependent and _device_label(before) != _device_label(after):
        verdict = "not_reported"
    return MetricDiff(
        name=metric.name,
        unit=metric.unit,
        better=metric.better,
        before=old,
        after=new,
        relative_change=change,
        threshold=float(threshold),
        verdict=verdict,
        regressed=verdict in {"regressed", "missing"},
        paired_interval=paired_interval,
    )


def _classify_change(
    metric: Metric, before: float | None, after: float | None, threshold: Fraction
) -> tuple[float | None, DiffVerdict]:
    """Relative change and verdict.

    Figures are taken as they are written in decimals, so that 3.15 is five percent more than 3 and not, as in binary
    fractions, a little more than that.
    """
    if before is None or after is None:
        return None, "new" if before is None else "missing"
    was, more = Fraction(str(before)), Fraction(str(after)) - Fraction(str(before))
    change = float(more / abs(was)) if was else 0.0 if not more else None
    allowed = threshold * abs(was)
    worse = more if metric.better == "lower" else -more
    if not more:
        return change, "equal"
    return change, "regressed" if worse > allowed else "improved" if -worse > allowed else "within"


@dataclass(frozen=True)
class _ExampleDifferences:
    """One figure of both runs, example by example."""

    differences: tuple[float, ...]
    """After less before."""
    weights: tuple[int, ...] | None
    """The labelled tokens of a loss."""


def _example_differences(metric: Metric, before: RunRecord, after: RunRecord) -> _ExampleDifferences | str | None:
    """The difference in a figure by example, or why there is none; None where it is not known, or not of quality."""
    if not metric.is_quality or metric_value(metric, before) is None or metric_value(metric, after) is None:
        return None
    figure = metric.name
    old, new = (record.quality.per_example if record.quality else None for record in (before, after))
    here, there = (_finite_scores(figure, scores) for scores in (old, new))
    if old is None or new is None or not here or not there:
        return "not both records have the scores of each example"
    if old.examples_fingerprint != new.examples_fingerprint or len(here) != len(there):
        return "they were not evaluated on the same examples"
    if figure == LOSS_METRIC and old.labelled_tokens != new.labelled_tokens:
        return "their summaries are not of the same tokens"
    if len(here) < 2:
        return "too few examples"
    differences = tuple(late - early for early, late in zip(here, there, strict=True))
    return _ExampleDifferences(differences, old.labelled_tokens if figure == LOSS_METRIC else None)


def compute_paired_intervals(matches: Sequence[Match]) -> list[dict[str, PairedInterval]]:
    """What the examples say of every figure of quality: for each match, by name.

    Intervals are corrected for how many they are. Those over the same examples are made together, which resamples once.
    """
    found: dict[tuple[int, str], _ExampleDifferences | str] = {}
    for place, match in enumerate(matches):
        if match.before is not None and match.after is not None:
            of_figures = {name: _example_differences(kind, match.before, match.after) for name, kind in METRICS.items()}
            found |= {(place, name): said for name, said in of_figures.items() if said is not None}
    confidence = bonferroni_confidence(sum(isinstance(one, _ExampleDifferences) for one in found.values()))
    paired = {key: PairedInterval(missing_reason=why) for key, why in found.items() if isinstance(why, str)}
    alike: dict[tuple[int, tuple[int, ...] | None], dict[tuple[int, str], _ExampleDifferences]] = {}
    for key, one in found.items():
        if isinstance(one, str):
            continue
        if not any(one.differences):  # nothing to draw from, and a suite that is as it was shall take no time
            paired[key] = _build_paired_interval(Interval(mean=0.0, low=0.0, high=0.0), len(one.differences))
        else:
            alike.setdefault((len(one.differences), one.weights), {})[key] = one
    for (count, weights), group in alike.items():
        intervals = paired_intervals([one.differences for one in group.values()], weights, confidence=confidence)
        paired |= {key: _build_paired_interval(interval, count) for key, interval in zip(group, intervals, strict=True)}
    by_match: list[dict[str, PairedInterval]] = [{} for _ in matches]
    for (place, name), judged in paired.items():
        by_match[place][name] = judged
    return by_match


def _build_paired_interval(interval: Interval, num_examples: int) -> PairedInterval:
    return PairedInterval(
        interval=interval, significant=interval.excludes_zero if num_examples >= MIN_EXAMPLES else None
    )


def _finite_scores(metric_name: str, scores: PerExample | None) -> tuple[float, ...]:
    """Of each example; none where one of them is not finite, or a loss is of nobody knows how many tokens."""
    if scores is None or (metric_name == LOSS_METRIC and len(scores.loss) != len(scores.labelled_tokens)):
        return ()
    found = scores.loss if metric_name == LOSS_METRIC else scores.rouge.get(metric_name, ())
    return found if all(map(math.isfinite, found)) else ()
