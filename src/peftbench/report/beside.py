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

from peftbench.evaluation.statistics import paired_intervals
from peftbench.record import ByExample, Interval, RunRecord
from peftbench.record.kept import Kept
from peftbench.report.differences import LEAST_EXAMPLES, corrected
from peftbench.report.figures import FIGURES, LOSS, OUTCOME, Kind, Thresholds, value_of
from peftbench.report.pairing import Change, Match, MatchedBy, Runs, changes, matched

Verdict = Literal["fell", "gained", "within", "equal", "lost", "untold", "new", "changed"]
"""Of a figure: worse or better by more than its threshold, by less, the same; known no more, or not told by the other
device, or known only now (these two are neither good nor bad); of an outcome, another that is not "ok" either.
"""


class Paired(Kept):
    """What the examples say of a change in quality."""

    interval: Interval | None = None
    """Of the mean difference, after less before, in the figure's unit: paired, over examples.

    All intervals of the comparison hold together with 95 %.
    """
    supported: bool | None = None
    """Whether the interval leaves zero out; None where there is no interval, and of fewer than 20 examples."""
    missing: str | None = None
    """Why there is no interval."""


class Figure(Kept):
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
    verdict: Verdict
    fell: bool
    """Worse by more than the threshold, or known no more."""
    paired: Paired | None = None
    """Of a quality figure that is known before and after."""


class Pair(Kept):
    """One run in both folders, or in one of them."""

    before: str | None
    """Its name there; None where it is new."""
    after: str | None
    """Its name there; None where it is missing, which is a fall."""
    matched_by: MatchedBy | None
    config: tuple[Change, ...] = ()
    """What changed, name and output_dir left out."""
    figures: tuple[Figure, ...] = ()
    """The outcome, and what is known of it on either side."""
    fell: bool
    """It is missing, or one of its figures fell."""

    @property
    def label(self) -> str:
        """The run's name, or both where it has two."""
        names = dict.fromkeys(name for name in (self.before, self.after) if name is not None)
        return " -> ".join(names)


class Side(Kept):
    """One of the two folders."""

    folder: str
    runs: int
    devices: tuple[str, ...]
    """Where its runs that are in both folders were made, as "a CPU (cpu)"."""


class Beside(Kept):
    """Two folders side by side."""

    before: Side
    """A."""
    after: Side
    """B."""
    two_machines: bool
    """Some run was made on another device than before, so that its times and memory are of two."""
    common: tuple[Change, ...]
    """What changed alike in all runs that are in both; it is in each pair's ``config`` too."""
    pairs: tuple[Pair, ...]
    fell: bool
    """Some run did."""
    changed: bool
    """Anything at all is not what it was."""


def beside(before: Path, after: Path, thresholds: Thresholds | None = None) -> Beside:
    """Hold the records below two folders against each other, run by run.

    Raises:
        RecordError: a folder has no records, one cannot be read, or two of a folder are of one name.
    """
    limits = thresholds or Thresholds()
    left, right = Runs.below(before), Runs.below(after)
    matches = matched(left, right)
    pairs = tuple(_pair(match, limits, paired) for match, paired in zip(matches, by_example(matches), strict=True))
    both = [(match.before, match.after) for match in matches if match.before and match.after]
    return Beside(
        before=_side(left, [old for old, _ in both]),
        after=_side(right, [new for _, new in both]),
        two_machines=any(_device(old) != _device(new) for old, new in both),
        common=_common([pair for pair in pairs if pair.matched_by]),
        pairs=pairs,
        fell=any(pair.fell for pair in pairs),
        changed=any(
            pair.matched_by is None or pair.config or any(figure.verdict != "equal" for figure in pair.figures)
            for pair in pairs
        ),
    )


def _side(runs: Runs, compared: Sequence[RunRecord]) -> Side:
    devices = tuple(dict.fromkeys(_device(record) for record in compared))
    return Side(folder=str(runs.folder), runs=len(runs.by_path), devices=devices)


def _device(record: RunRecord) -> str:
    return f"{record.device.name or 'a device without a name'} ({record.device.kind})"


def _common(pairs: Sequence[Pair]) -> tuple[Change, ...]:
    """As JSON they are compared, for which true is not 1."""
    others = [{change.model_dump_json() for change in pair.config} for pair in pairs[1:]]
    first = pairs[0].config if pairs else ()
    return tuple(change for change in first if all(change.model_dump_json() in other for other in others))


def _pair(match: Match, thresholds: Thresholds, paired: Mapping[str, Paired]) -> Pair:
    old, new = match.before, match.after
    names = (old.name if old else None, new.name if new else None)
    if old is None or new is None:
        return Pair(before=names[0], after=names[1], matched_by=None, fell=new is None)
    figures = _figures_of(old, new, thresholds, paired)
    return Pair(
        before=names[0], after=names[1], matched_by=match.by, config=changes(old, new), figures=figures,
        fell=any(figure.fell for figure in figures),
    )  # fmt: skip


def _figures_of(
    before: RunRecord, after: RunRecord, thresholds: Thresholds, paired: Mapping[str, Paired]
) -> tuple[Figure, ...]:
    """The outcome, then every figure that is known before or after."""
    known = [_figure(kind, before, after, thresholds.of(name), paired.get(name)) for name, kind in FIGURES.items()]
    return (_outcome(before, after), *(figure for figure in known if figure is not None))


def _outcome(before: RunRecord, after: RunRecord) -> Figure:
    old, new = before.outcome.kind, after.outcome.kind
    verdict: Verdict = "equal" if old == new else "fell" if old == "ok" else "gained" if new == "ok" else "changed"
    return Figure(
        name=OUTCOME, unit="", better="ok", before=old, after=new, verdict=verdict, fell=verdict == "fell"
    )  # fmt: skip


def _figure(
    kind: Kind, before: RunRecord, after: RunRecord, threshold: Fraction, paired: Paired | None
) -> Figure | None:
    old, new = value_of(kind, before), value_of(kind, after)
    if old is None and new is None:
        return None
    change, verdict = _judged(kind, old, new, threshold)
    if verdict == "lost" and kind.told_by_device and _device(before) != _device(after):
        verdict = "untold"
    return Figure(
        name=kind.name, unit=kind.unit, better=kind.better, before=old, after=new, change=change,
        threshold=float(threshold), verdict=verdict, fell=verdict in {"fell", "lost"},
        paired=paired,
    )  # fmt: skip


def _judged(kind: Kind, old: float | None, new: float | None, threshold: Fraction) -> tuple[float | None, Verdict]:
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
class _Examples:
    """One figure of both runs, example by example."""

    differences: tuple[float, ...]
    """After less before."""
    weights: tuple[int, ...] | None
    """The labelled tokens of a loss."""


def _examples(kind: Kind, before: RunRecord, after: RunRecord) -> _Examples | str | None:
    """The difference in a figure by example, or why there is none; None where it is not known, or not of quality."""
    if not kind.quality or value_of(kind, before) is None or value_of(kind, after) is None:
        return None
    figure = kind.name
    old, new = (record.quality.by_example if record.quality else None for record in (before, after))
    here, there = (_scores(figure, scores) for scores in (old, new))
    if old is None or new is None or not here or not there:
        return "not both records have the scores of each example"
    if old.identity != new.identity or len(here) != len(there):
        return "they were not evaluated on the same examples"
    if figure == LOSS and old.labelled != new.labelled:
        return "their summaries are not of the same tokens"
    if len(here) < 2:
        return "too few examples"
    differences = tuple(late - early for early, late in zip(here, there, strict=True))
    return _Examples(differences, old.labelled if figure == LOSS else None)


def by_example(matches: Sequence[Match]) -> list[dict[str, Paired]]:
    """What the examples say of every figure of quality: for each match, by name.

    Intervals are corrected for how many they are. Those over the same examples are made together, which resamples once.
    """
    found: dict[tuple[int, str], _Examples | str] = {}
    for place, match in enumerate(matches):
        if match.before is not None and match.after is not None:
            of_figures = {name: _examples(kind, match.before, match.after) for name, kind in FIGURES.items()}
            found |= {(place, name): said for name, said in of_figures.items() if said is not None}
    confidence = corrected(sum(isinstance(one, _Examples) for one in found.values()))
    paired = {key: Paired(missing=why) for key, why in found.items() if isinstance(why, str)}
    alike: dict[tuple[int, tuple[int, ...] | None], dict[tuple[int, str], _Examples]] = {}
    for key, one in found.items():
        if isinstance(one, str):
            continue
        if not any(one.differences):  # nothing to draw from, and a suite that is as it was shall take no time
            paired[key] = _judged_interval(Interval(mean=0.0, low=0.0, high=0.0), len(one.differences))
        else:
            alike.setdefault((len(one.differences), one.weights), {})[key] = one
    for (count, weights), group in alike.items():
        intervals = paired_intervals([one.differences for one in group.values()], weights, confidence=confidence)
        paired |= {key: _judged_interval(interval, count) for key, interval in zip(group, intervals, strict=True)}
    by_match: list[dict[str, Paired]] = [{} for _ in matches]
    for (place, name), judged in paired.items():
        by_match[place][name] = judged
    return by_match


def _judged_interval(interval: Interval, examples: int) -> Paired:
    return Paired(interval=interval, supported=interval.excludes_zero if examples >= LEAST_EXAMPLES else None)


def _scores(figure: str, scores: ByExample | None) -> tuple[float, ...]:
    """Of each example; none where one of them is not finite, or a loss is of nobody knows how many tokens."""
    if scores is None or (figure == LOSS and len(scores.loss) != len(scores.labelled)):
        return ()
    found = scores.loss if figure == LOSS else scores.rouge.get(figure, ())
    return found if all(map(math.isfinite, found)) else ()
