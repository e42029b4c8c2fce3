"""Comparison of two result folders: changed settings and metrics.

Data only; ``render`` formats it. Relative changes are fractions of the value before: 0.05 is five percent.
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
from peftbench.report.diff.metrics import (
    LOSS_METRIC,
    OUTCOME_METRIC,
    ComparedMetric,
    Thresholds,
    list_compared_metrics,
    metric_value,
)

DiffVerdict = Literal["regressed", "improved", "within", "equal", "missing", "not_reported", "new", "changed"]
"""Verdict on a metric. regressed, improved: worse or better by more than the threshold; within: by less; missing: no
longer known; not_reported: not measurable on the other device; new: not known before. changed: an outcome that was
not "ok" and is not "ok" changed.
"""


class PairedInterval(RecordModel):
    """Interval of a change in quality, paired over examples."""

    interval: Interval | None = None
    """Interval of the mean difference, after minus before, in the metric's unit.

    All intervals of a comparison are simultaneous at 95 %.
    """
    significant: bool | None = None
    """True if the interval excludes zero; None without an interval or with fewer than 20 examples."""
    missing_reason: str | None = None
    """Reason for a missing interval."""


class MetricDiff(RecordModel):
    """One metric of a run, before and after."""

    name: str
    unit: str
    before_text: str
    """The value before, formatted with its unit."""
    after_text: str
    better: Literal["higher", "lower", "ok"]
    """Direction of improvement; for an outcome, the good value."""
    before: int | float | str | None
    after: int | float | str | None
    relative_change: float | None = None
    """Fraction of ``before``; None if a value is unknown, zero before, or not a number."""
    threshold: float | None = None
    """Allowed fraction by which the metric may be worse."""
    verdict: DiffVerdict
    regressed: bool
    """Worse by more than the threshold, or no longer known."""
    paired_interval: PairedInterval | None = None
    """Set for a quality metric known before and after."""


class RunDiff(RecordModel):
    """One run in both folders, or in one of them."""

    before: str | None
    """Name before; None if the run is new."""
    after: str | None
    """Name after; None if the run is missing, which is a regression."""
    matched_by: MatchedBy | None
    config_changes: tuple[SettingChange, ...] = ()
    """Changed settings, name and output_dir excluded."""
    metrics: tuple[MetricDiff, ...] = ()
    """The outcome, and every metric known before or after."""
    regressed: bool
    """True if the run is missing or one of its metrics regressed."""

    @property
    def label(self) -> str:
        """Name of the run, or both names if they differ."""
        names = dict.fromkeys(name for name in (self.before, self.after) if name is not None)
        return " -> ".join(names)


class SuiteSide(RecordModel):
    """One of the two folders."""

    folder: str
    num_runs: int
    devices: tuple[str, ...]
    """Devices of the runs that are in both folders, e.g. "NVIDIA L4 (cuda)"."""
    unreadable: tuple[str, ...] = ()
    """Sentences with path and reason on the records that cannot be read; their runs are not compared."""


class SuiteDiff(RecordModel):
    """Comparison of two result folders."""

    before: SuiteSide
    """Folder A."""
    after: SuiteSide
    """Folder B."""
    different_devices: bool
    """True if a run used another device than before, so that times and memory are not comparable."""
    common_changes: tuple[SettingChange, ...]
    """Changes shared by all runs in both folders; also in each run's ``config_changes``."""
    runs: tuple[RunDiff, ...]
    regressed: bool
    """True if a run regressed."""
    changed: bool
    """True if anything differs."""


def diff_suites(before: Path, after: Path, thresholds: Thresholds | None = None) -> SuiteDiff:
    """Compare the records below two folders, run by run.

    Raises:
        RecordError: a folder has no readable records, or two in a folder have the same name.
        UnknownKeyError: a threshold is for a metric that the runs do not have.
    """
    limits = thresholds or Thresholds()
    left, right = Runs.load(before), Runs.load(after)
    metrics = list_compared_metrics([*left.by_path.values(), *right.by_path.values()])
    limits.check_names(metrics)
    matches = match_runs(left, right)
    pairs = tuple(
        _diff_run(match, metrics, limits, paired)
        for match, paired in zip(matches, compute_paired_intervals(matches, metrics), strict=True)
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
            pair.matched_by is None or pair.config_changes or any(metric.verdict != "equal" for metric in pair.metrics)
            for pair in pairs
        ),
    )


def _build_side(runs: Runs, records: Sequence[RunRecord]) -> SuiteSide:
    devices = tuple(dict.fromkeys(_device_label(record) for record in records))
    return SuiteSide(folder=str(runs.folder), num_runs=len(runs.by_path), devices=devices, unreadable=runs.unreadable)


def _device_label(record: RunRecord) -> str:
    return f"{record.device.name or 'unnamed device'} ({record.device.type})"


def _common_changes(run_diffs: Sequence[RunDiff]) -> tuple[SettingChange, ...]:
    """Return changes shared by all runs. They are compared as JSON, where true differs from 1."""
    others = [{change.model_dump_json() for change in pair.config_changes} for pair in run_diffs[1:]]
    first = run_diffs[0].config_changes if run_diffs else ()
    return tuple(change for change in first if all(change.model_dump_json() in other for other in others))


def _diff_run(
    match: Match,
    metrics_by_name: Mapping[str, ComparedMetric],
    thresholds: Thresholds,
    intervals: Mapping[str, PairedInterval],
) -> RunDiff:
    old, new = match.before, match.after
    names = (old.name if old else None, new.name if new else None)
    if old is None or new is None:
        return RunDiff(before=names[0], after=names[1], matched_by=None, regressed=new is None)
    metrics = _diff_metrics(old, new, metrics_by_name, thresholds, intervals)
    return RunDiff(
        before=names[0],
        after=names[1],
        matched_by=match.matched_by,
        config_changes=diff_settings(old, new),
        metrics=metrics,
        regressed=any(metric.regressed for metric in metrics),
    )


def _diff_metrics(
    before: RunRecord,
    after: RunRecord,
    metrics: Mapping[str, ComparedMetric],
    thresholds: Thresholds,
    intervals: Mapping[str, PairedInterval],
) -> tuple[MetricDiff, ...]:
    """Return the outcome, then every metric known before or after."""
    known = [
        _diff_metric(metric, before, after, thresholds.for_metric(name), intervals.get(name))
        for name, metric in metrics.items()
    ]
    return (_diff_outcome(before, after), *(metric for metric in known if metric is not None))


def _diff_outcome(before: RunRecord, after: RunRecord) -> MetricDiff:
    old, new = before.outcome.kind, after.outcome.kind
    verdict: DiffVerdict = "changed"
    if old == new:
        verdict = "equal"
    elif "ok" in (old, new):
        verdict = "regressed" if old == "ok" else "improved"
    return MetricDiff(
        name=OUTCOME_METRIC,
        unit="",
        before_text=old,
        after_text=new,
        better="ok",
        before=old,
        after=new,
        verdict=verdict,
        regressed=verdict == "regressed",
    )


def _diff_metric(
    metric: ComparedMetric,
    before: RunRecord,
    after: RunRecord,
    threshold: Fraction,
    paired_interval: PairedInterval | None,
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
        before_text=_format_value(metric, old),
        after_text=_format_value(metric, new),
        better=metric.better,
        before=old,
        after=new,
        relative_change=change,
        threshold=float(threshold),
        verdict=verdict,
        regressed=verdict in {"regressed", "missing"},
        paired_interval=paired_interval,
    )


def _format_value(metric: ComparedMetric, value: float | None) -> str:
    return "unknown" if value is None else metric.format_value(value)


def _classify_change(
    metric: ComparedMetric, before: float | None, after: float | None, threshold: Fraction
) -> tuple[float | None, DiffVerdict]:
    """Return relative change and verdict.

    Values are compared as decimals: 3.15 is exactly five percent more than 3, in binary fractions slightly more.
    """
    if before is None or after is None:
        return None, "new" if before is None else "missing"
    old, difference = Fraction(str(before)), Fraction(str(after)) - Fraction(str(before))
    change = float(difference / abs(old)) if old else 0.0 if not difference else None
    allowed = threshold * abs(old)
    worse = difference if metric.better == "lower" else -difference
    if not difference:
        return change, "equal"
    return change, "regressed" if worse > allowed else "improved" if -worse > allowed else "within"


@dataclass(frozen=True)
class _ExampleDifferences:
    """Differences of one metric between two runs, per example."""

    differences: tuple[float, ...]
    """After minus before."""
    weights: tuple[int, ...] | None
    """Labeled tokens of each example for a loss, None for a score."""


def _example_differences(
    metric: ComparedMetric, before: RunRecord, after: RunRecord
) -> _ExampleDifferences | str | None:
    """Return per-example differences, or the reason for their absence; None if unknown or not a quality metric."""
    if not metric.is_quality or metric_value(metric, before) is None or metric_value(metric, after) is None:
        return None
    name = metric.name
    old, new = (record.quality.per_example if record.quality else None for record in (before, after))
    before_scores, after_scores = (_finite_scores(name, scores) for scores in (old, new))
    if old is None or new is None or not before_scores or not after_scores:
        return "per-example scores are missing in at least one record"
    if old.examples_fingerprint != new.examples_fingerprint or len(before_scores) != len(after_scores):
        return "the runs were not evaluated on the same examples"
    if name == LOSS_METRIC and old.labeled_tokens != new.labeled_tokens:
        return "the labeled texts have different tokens"
    if len(before_scores) < 2:
        return "too few examples"
    differences = tuple(late - early for early, late in zip(before_scores, after_scores, strict=True))
    return _ExampleDifferences(differences, old.labeled_tokens if name == LOSS_METRIC else None)


def compute_paired_intervals(
    matches: Sequence[Match], metrics: Mapping[str, ComparedMetric]
) -> list[dict[str, PairedInterval]]:
    """Return the intervals of all quality metrics: for each match, by metric name.

    Intervals are corrected for their number. Those with the same weights share one resampling.
    """
    differences: dict[tuple[int, str], _ExampleDifferences | str] = {}
    for index, match in enumerate(matches):
        if match.before is not None and match.after is not None:
            by_metric = {name: _example_differences(kind, match.before, match.after) for name, kind in metrics.items()}
            differences |= {(index, name): result for name, result in by_metric.items() if result is not None}
    confidence = bonferroni_confidence(sum(isinstance(one, _ExampleDifferences) for one in differences.values()))
    paired = {
        key: PairedInterval(missing_reason=reason) for key, reason in differences.items() if isinstance(reason, str)
    }
    same_weights: dict[tuple[int, tuple[int, ...] | None], dict[tuple[int, str], _ExampleDifferences]] = {}
    for key, one in differences.items():
        if isinstance(one, str):
            continue
        if not any(one.differences):  # an unchanged suite needs no resampling
            paired[key] = _build_paired_interval(Interval(mean=0.0, low=0.0, high=0.0), len(one.differences))
        else:
            same_weights.setdefault((len(one.differences), one.weights), {})[key] = one
    for (count, weights), group in same_weights.items():
        intervals = paired_intervals([one.differences for one in group.values()], weights, confidence=confidence)
        paired |= {key: _build_paired_interval(interval, count) for key, interval in zip(group, intervals, strict=True)}
    by_match: list[dict[str, PairedInterval]] = [{} for _ in matches]
    for (index, name), interval_of_metric in paired.items():
        by_match[index][name] = interval_of_metric
    return by_match


def _build_paired_interval(interval: Interval, num_examples: int) -> PairedInterval:
    return PairedInterval(
        interval=interval, significant=interval.excludes_zero if num_examples >= MIN_EXAMPLES else None
    )


def _finite_scores(metric_name: str, scores: PerExample | None) -> tuple[float, ...]:
    """Return per-example scores; empty if one is not finite or the token counts of a loss are missing."""
    if scores is None or (metric_name == LOSS_METRIC and len(scores.loss) != len(scores.labeled_tokens)):
        return ()
    values = scores.loss if metric_name == LOSS_METRIC else scores.metrics.get(metric_name, ())
    return values if all(map(math.isfinite, values)) else ()
