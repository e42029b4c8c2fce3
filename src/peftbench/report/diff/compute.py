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

from peftbench.evaluation.intervals import paired_intervals
from peftbench.record import PerExample, Interval, RunRecord
from peftbench.record.kept import RecordModel
from peftbench.report.analysis.significance import MIN_EXAMPLES, bonferroni_confidence
from peftbench.report.diff.metrics import METRICS, LOSS_METRIC, OUTCOME_METRIC, Metric, Thresholds, metric_value
from peftbench.report.diff.matching import SettingChange, Match, MatchedBy, Runs, diff_settings, match_runs

DiffVerdict = Literal["fell", "gained", "within", "equal", "lost", "untold", "new", "changed"]
"""Of a figure: worse or better by more than its threshold, by less, the same; known no more, or not told by the other
device, or known only now (these two are neither good nor bad); of an outcome, another that is not "ok" either.
"""


class PairedInterval(RecordModel):
    """What the examples say of a change in quality."""

    interval: Interval | None = None
    """Of the mean difference, after less before, in the figure's unit: paired, over examples.

    All intervals of the comparison hold together with 95 %.
    """
    supported: bool | None = None
    """Whether the interval leaves zero out; None where there is no interval, and of fewer than 20 examples."""
    missing: str | None = None
    """Why there is no interval."""


class MetricDiff(RecordModel):
    """One figure of a run, before and after."""

    name: str
    unit: str
    better: Literal["higher", "lower", "ok"]
    """Which direction is good; of an outcome, which value."""
    before: int | float | str | None
    after: int | float | str | None
    change: float | None = None
    """As a share of ``before``; None where a figure is unknown, was zero or is no number."""
    threshold: float | None = None
    """By which share it may be worse."""
    verdict: DiffVerdict
    fell: bool
    """Worse by more than the threshold, or known no more."""
    paired: PairedInterval | None = None
    """Of a quality figure that is known before and after."""


class RunDiff(RecordModel):
    """One run in both folders, or in one of them."""

    before: str | None
    """Its name there; None where it is new."""
    after: str | None
    """Its name there; None where it is missing, which is a fall."""
    matched_by: MatchedBy | None
    config: tuple[SettingChange, ...] = ()
    """What changed, name and output_dir left out."""
    figures: tuple[MetricDiff, ...] = ()
    """The outcome, and what is known of it on either side."""
    fell: bool
    """It is missing, or one of its figures fell."""

    @property
    def label(self) -> str:
        """The run's name, or both where it has two."""
        names = dict.fromkeys(name for name in (self.before, self.after) if name is not None)
        return " -> ".join(names)


class SuiteSide(RecordModel):
    """One of the two folders."""

    folder: str
    runs: int
    devices: tuple[str, ...]
    """Where its runs that are in both folders were made, as "a CPU (cpu)"."""


class SuiteDiff(RecordModel):
    """Two folders side by side."""

    before: SuiteSide
    """A."""
    after: SuiteSide
    """B."""
    two_machines: bool
    """Some run was made on another device than before, so that its times and memory are of two."""
    common: tuple[SettingChange, ...]
    """What changed alike in all runs that are in both; it is in each pair's ``config`` too."""
    pairs: tuple[RunDiff, ...]
    fell: bool
    """Some run did."""
    changed: bool
    """Anything at all is not what it was."""


def diff_suites(before: Path, after: Path, thresholds: Thresholds | None = None) -> SuiteDiff:
    """Hold the records below two folders against each other, run by run.

    Raises:
        RecordError: a folder has no records, one cannot be read, or two of a folder are of one name.
    """
    limits = thresholds or Thresholds()
    left, right = Runs.below(before), Runs.below(after)
    matches = match_runs(left, right)
    pairs = tuple(_diff_run(match, limits, paired) for match, paired in zip(matches, compute_paired_intervals(matches), strict=True))
    both = [(match.before, match.after) for match in matches if match.before and match.after]
    return SuiteDiff(
        before=_build_side(left, [old for old, _ in both]),
        after=_build_side(right, [new for _, new in both]),
        two_machines=any(_device_label(old) != _device_label(new) for old, new in both),
        common=_common_changes([pair for pair in pairs if pair.matched_by]),
        pairs=pairs,
        fell=any(pair.fell for pair in pairs),
        changed=any(
            pair.matched_by is None or pair.config or any(figure.verdict != "equal" for figure in pair.figures)
            for pair in pairs
        ),
    )


def _build_side(runs: Runs, compared: Sequence[RunRecord]) -> SuiteSide:
    devices = tuple(dict.fromkeys(_device_label(record) for record in compared))
    return SuiteSide(folder=str(runs.folder), runs=len(runs.by_path), devices=devices)


def _device_label(record: RunRecord) -> str:
    return f"{record.device.name or 'a device without a name'} ({record.device.kind})"


def _common_changes(pairs: Sequence[RunDiff]) -> tuple[SettingChange, ...]:
    """As JSON they are compared, for which true is not 1."""
    others = [{change.model_dump_json() for change in pair.config} for pair in pairs[1:]]
    first = pairs[0].config if pairs else ()
    return tuple(change for change in first if all(change.model_dump_json() in other for other in others))


def _diff_run(match: Match, thresholds: Thresholds, paired: Mapping[str, PairedInterval]) -> RunDiff:
    old, new = match.before, match.after
    names = (old.name if old else None, new.name if new else None)
    if old is None or new is None:
        return RunDiff(before=names[0], after=names[1], matched_by=None, fell=new is None)
    figures = _diff_metrics(old, new, thresholds, paired)
    return RunDiff(
        before=names[0], after=names[1], matched_by=match.by, config=diff_settings(old, new), figures=figures,
        fell=any(figure.fell for figure in figures),
    )  # fmt: skip


def _diff_metrics(
    before: RunRecord, after: RunRecord, thresholds: Thresholds, paired: Mapping[str, PairedInterval]
) -> tuple[MetricDiff, ...]:
    """The outcome, then every figure that is known before or after."""
    known = [_diff_metric(kind, before, after, thresholds.of(name), paired.get(name)) for name, kind in METRICS.items()]
    return (_diff_outcome(before, after), *(figure for figure in known if figure is not None))


def _diff_outcome(before: RunRecord, after: RunRecord) -> MetricDiff:
    old, new = before.outcome.kind, after.outcome.kind
    verdict: DiffVerdict = "equal" if old == new else "fell" if old == "ok" else "gained" if new == "ok" else "changed"
    return MetricDiff(
        name=OUTCOME_METRIC, unit="", better="ok", before=old, after=new, verdict=verdict, fell=verdict == "fell"
    )  # fmt: skip


def _diff_metric(
    kind: Metric, before: RunRecord, after: RunRecord, threshold: Fraction, paired: PairedInterval | None
) -> MetricDiff | None:
    old, new = metric_value(kind, before), metric_value(kind, after)
    if old is None and new is None:
        return None
    change, verdict = _classify_change(kind, old, new, threshold)
    if verdict == "lost" and kind.told_by_device and _device_label(before) != _device_label(after):
        verdict = "untold"
    return MetricDiff(
        name=kind.name, unit=kind.unit, better=kind.better, before=old, after=new, change=change,
        threshold=float(threshold), verdict=verdict, fell=verdict in {"fell", "lost"},
        paired=paired,
    )  # fmt: skip


def _classify_change(kind: Metric, old: float | None, new: float | None, threshold: Fraction) -> tuple[float | None, DiffVerdict]:
    """Relative change and verdict.

    Figures are taken as they are written in decimals, so that 3.15 is five percent more than 3 and not, as in binary
    fractions, a little more than that.
    """
    if old is None or new is None:
        return None, "new" if old is None else "lost"
    was, more = Fraction(str(old)), Fraction(str(new)) - Fraction(str(old))
    change = float(more / abs(was)) if was else 0.0 if not more else None
    allowed = threshold * abs(was)
    worse = more if kind.better == "lower" else -more
    if not more:
        return change, "equal"
    return change, "fell" if worse > allowed else "gained" if -worse > allowed else "within"


@dataclass(frozen=True)
class _ExampleDifferences:
    """One figure of both runs, example by example."""

    differences: tuple[float, ...]
    """After less before."""
    weights: tuple[int, ...] | None
    """The labelled tokens of a loss."""


def _example_differences(kind: Metric, before: RunRecord, after: RunRecord) -> _ExampleDifferences | str | None:
    """The difference in a figure by example, or why there is none; None where it is not known, or not of quality."""
    if not kind.quality or metric_value(kind, before) is None or metric_value(kind, after) is None:
        return None
    figure = kind.name
    old, new = (record.quality.by_example if record.quality else None for record in (before, after))
    here, there = (_finite_scores(figure, scores) for scores in (old, new))
    if old is None or new is None or not here or not there:
        return "not both records have the scores of each example"
    if old.identity != new.identity or len(here) != len(there):
        return "they were not evaluated on the same examples"
    if figure == LOSS_METRIC and old.labelled != new.labelled:
        return "their summaries are not of the same tokens"
    if len(here) < 2:
        return "too few examples"
    differences = tuple(late - early for early, late in zip(here, there, strict=True))
    return _ExampleDifferences(differences, old.labelled if figure == LOSS_METRIC else None)


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
    paired = {key: PairedInterval(missing=why) for key, why in found.items() if isinstance(why, str)}
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


def _build_paired_interval(interval: Interval, examples: int) -> PairedInterval:
    return PairedInterval(interval=interval, supported=interval.excludes_zero if examples >= MIN_EXAMPLES else None)


def _finite_scores(figure: str, scores: PerExample | None) -> tuple[float, ...]:
    """Of each example; none where one of them is not finite, or a loss is of nobody knows how many tokens."""
    if scores is None or (figure == LOSS_METRIC and len(scores.loss) != len(scores.labelled)):
        return ()
    found = scores.loss if figure == LOSS_METRIC else scores.rouge.get(figure, ())
    return found if all(map(math.isfinite, found)) else ()
