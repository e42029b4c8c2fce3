"""Two suites side by side, before and after or on two machines: what changed in config, and what in figures.

Data alone; ``beside_text`` is what a person reads of it. Shares are of what a figure was before: 0.05 is five percent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

from peftbench.evaluation.statistics import paired_interval
from peftbench.record import ByExample, Interval, RunRecord
from peftbench.record.kept import Kept
from peftbench.report.figures import FIGURES, LOSS, OUTCOME, Kind, Thresholds, value_of
from peftbench.report.pairing import Change, Match, MatchedBy, Runs, changes, matched

Verdict = Literal["fell", "gained", "within", "equal", "lost", "untold", "new", "changed"]
"""Of a figure: worse or better by more than its threshold, by less, the same; known no more, or not told by the other
device, or known only now (these two are neither good nor bad); of an outcome, another that is not "ok" either.
"""


class Paired(Kept):
    """What the examples say of a change in quality."""

    interval: Interval | None = None
    """Of the mean difference, after less before, in the figure's unit: 95 %, paired, over examples."""
    supported: bool | None = None
    """Whether the interval leaves zero out; None where there is no interval."""
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
    pairs = tuple(_pair(match, limits) for match in matches)
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


def _pair(match: Match, thresholds: Thresholds) -> Pair:
    old, new = match.before, match.after
    names = (old.name if old else None, new.name if new else None)
    if old is None or new is None:
        return Pair(before=names[0], after=names[1], matched_by=None, fell=new is None)
    figures = _figures_of(old, new, thresholds)
    return Pair(
        before=names[0], after=names[1], matched_by=match.by, config=changes(old, new), figures=figures,
        fell=any(figure.fell for figure in figures),
    )  # fmt: skip


def _figures_of(before: RunRecord, after: RunRecord, thresholds: Thresholds) -> tuple[Figure, ...]:
    """The outcome, then every figure that is known before or after."""
    known = [_figure(kind, before, after, thresholds.of(name)) for name, kind in FIGURES.items()]
    return (_outcome(before, after), *(figure for figure in known if figure is not None))


def _outcome(before: RunRecord, after: RunRecord) -> Figure:
    old, new = before.outcome.kind, after.outcome.kind
    verdict: Verdict = "equal" if old == new else "fell" if old == "ok" else "gained" if new == "ok" else "changed"
    return Figure(
        name=OUTCOME, unit="", better="ok", before=old, after=new, verdict=verdict, fell=verdict == "fell"
    )  # fmt: skip


def _figure(kind: Kind, before: RunRecord, after: RunRecord, threshold: Fraction) -> Figure | None:
    old, new = value_of(kind, before), value_of(kind, after)
    if old is None and new is None:
        return None
    change, verdict = _judged(kind, old, new, threshold)
    if verdict == "lost" and kind.told_by_device and _device(before) != _device(after):
        verdict = "untold"
    return Figure(
        name=kind.name, unit=kind.unit, better=kind.better, before=old, after=new, change=change,
        threshold=float(threshold), verdict=verdict, fell=verdict in {"fell", "lost"},
        paired=_paired(kind.name, before, after) if kind.quality and old is not None and new is not None else None,
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


def _paired(figure: str, before: RunRecord, after: RunRecord) -> Paired:
    """What the examples say of the difference in ``figure``, which is one of quality."""
    old, new = (record.quality.by_example if record.quality else None for record in (before, after))
    here, there = (_scores(figure, scores) for scores in (old, new))
    if old is None or new is None or not here or not there:
        return Paired(missing="not both records have the scores of each example")
    if old.identity != new.identity or len(here) != len(there):
        return Paired(missing="they were not evaluated on the same examples")
    if figure == LOSS and old.labelled != new.labelled:
        return Paired(missing="their summaries are not of the same tokens")
    differences = [late - early for early, late in zip(here, there, strict=True)]
    if not any(differences):  # nothing to draw from, and a suite that is as it was shall take no time
        return Paired(interval=Interval(mean=0.0, low=0.0, high=0.0), supported=False)
    interval = paired_interval(differences, old.labelled if figure == LOSS else None)
    return Paired(interval=interval, supported=interval.low > 0 or interval.high < 0)


def _scores(figure: str, scores: ByExample | None) -> tuple[float, ...]:
    """Of each example; none where one of them is not finite, or a loss is of nobody knows how many tokens."""
    if scores is None or (figure == LOSS and len(scores.loss) != len(scores.labelled)):
        return ()
    found = scores.loss if figure == LOSS else scores.rouge.get(figure, ())
    return found if all(map(math.isfinite, found)) else ()
