"""Scores that can be compared: one metric, the same examples, by group and seed."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy
from numpy.typing import NDArray

from peftbench.record import PerExample, RunRecord
from peftbench.report.analysis.quality_metrics import HELD_OUT_LOSS, QualityMetric, get_headline_metric
from peftbench.report.analysis.run_groups import RunGroup, Seed, seed_of
from peftbench.report.text.formatting import join_with_and, truncate_list

_Array = NDArray[numpy.float64]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Scores:
    """Scores of shape (examples,) by group and seed, of one metric and the same examples."""

    metric: QualityMetric | None = None
    weights: _Array = field(default_factory=lambda: numpy.ones(0))
    """(examples,): labeled tokens of each example for a loss, ones for a score."""
    by_group_and_seed: dict[RunGroup, dict[Seed, _Array]] = field(default_factory=dict)
    exclusion_notes: tuple[str, ...] = ()
    """One sentence per reason for the exclusion of runs."""

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return len(self.weights)

    def means_by_seed(self, group: RunGroup) -> list[float]:
        """Return the mean over examples of each of a group's seeds, in the metric's unit."""
        return [float(score.sum() / self.weights.sum()) for score in self.by_group_and_seed[group].values()]

    def mean(self, group: RunGroup) -> float:
        """Return the mean over a group's seeds, in the metric's unit."""
        return statistics.fmean(self.means_by_seed(group))

    def mean_over_seeds(self, group: RunGroup, seeds: Iterable[Seed]) -> _Array:
        """Return the mean score of each example over ``seeds``; a group with a single run has it for any seed."""
        by_seed = self.by_group_and_seed[group]
        selected = list(by_seed.values()) if len(by_seed) == 1 else [by_seed[seed] for seed in seeds]
        return numpy.mean(selected, axis=0, dtype=float)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _ScoredRun:
    group: RunGroup
    record: RunRecord
    scores: PerExample

    @property
    def headline(self) -> QualityMetric | None:
        """The run's headline metric if the values of its examples are known."""
        metric = get_headline_metric(self.record)
        return metric if metric is not None and metric.get_example_values(self.scores) else None


def collect_scores(groups: Sequence[RunGroup]) -> Scores:
    """Return comparable scores of the runs with outcome ok: of their headline metric if all have the same, else losses.

    If runs were evaluated on different examples, those of most groups are used.
    """
    notes: list[str] = []
    evaluated = [(one, run, run.quality) for one in groups for run in one.ok_runs if run.quality is not None]
    runs = [
        _ScoredRun(one, run, quality.per_example) for one, run, quality in evaluated if quality.per_example is not None
    ]
    _add_note(
        notes,
        (one for one, _, quality in evaluated if quality.per_example is None),
        "Not compared, no per-example scores in the record",
    )
    runs = _filter_runs(runs, notes, _has_finite_scores, "Not compared, a score is not finite")
    fingerprint = _most_common((run.group, run.scores.examples_fingerprint) for run in runs)
    runs = _filter_runs(
        runs,
        notes,
        lambda run: run.scores.examples_fingerprint == fingerprint,
        "Not compared, evaluated on different examples than most",
    )
    headlines = {run.headline for run in runs}
    headline = next(iter(headlines), None)
    if len(headlines) == 1 and headline is not None:
        return _collect_headline_scores(runs, headline, notes)
    return _collect_loss_scores(runs, notes)


def _collect_headline_scores(runs: list[_ScoredRun], metric: QualityMetric, exclusion_notes: list[str]) -> Scores:
    length = _most_common((run.group, len(metric.get_example_values(run.scores))) for run in runs)
    runs = _filter_runs(
        runs,
        exclusion_notes,
        lambda run: len(metric.get_example_values(run.scores)) == length,
        "Not compared, a different number of scores than most",
    )
    if not length:
        return Scores(exclusion_notes=tuple(exclusion_notes))
    return Scores(
        metric,
        numpy.ones(length),
        _scores_by_group_and_seed(runs, lambda run: metric.get_example_values(run.scores)),
        tuple(exclusion_notes),
    )


def _add_headline_note(runs: Sequence[_ScoredRun], exclusion_notes: list[str]) -> None:
    """Add a note on why runs with headline metrics are compared by held-out loss."""
    labels: dict[QualityMetric | None, list[str]] = {}
    for run in runs:
        labels.setdefault(run.headline, []).append(run.group.label)
    titles = [metric.name for metric in labels if metric is not None]
    reason = "All runs are compared by held-out loss, because"
    if len(titles) == 1:
        without = (run.group for run in runs if run.headline is None)
        _add_note(exclusion_notes, without, f"{reason} these have no {titles[0]}")
    elif titles:
        used = [
            f"{metric.name if metric else 'none'} of {join_with_and(truncate_list(list(dict.fromkeys(names))))}"
            for metric, names in labels.items()
        ]
        exclusion_notes.append(f"{reason} their headline metrics differ: {'; '.join(used)}")


def _collect_loss_scores(runs: list[_ScoredRun], exclusion_notes: list[str]) -> Scores:
    _add_headline_note(runs, exclusion_notes)
    runs = _filter_runs(
        runs,
        exclusion_notes,
        lambda run: bool(run.scores.loss),
        "Not compared, no held-out loss",
    )
    tokens = _most_common((run.group, run.scores.labeled_tokens) for run in runs)
    runs = _filter_runs(
        runs,
        exclusion_notes,
        lambda run: run.scores.labeled_tokens == tokens and len(run.scores.loss) == len(tokens),
        "Not compared, losses over different tokens than most (another tokenizer)",
    )
    if not tokens or not any(tokens):
        return Scores(exclusion_notes=tuple(exclusion_notes))
    return Scores(
        HELD_OUT_LOSS,
        numpy.asarray(tokens, dtype=float),
        _scores_by_group_and_seed(runs, lambda run: run.scores.loss),
        tuple(exclusion_notes),
    )


def _has_finite_scores(run: _ScoredRun) -> bool:
    values = run.headline.get_example_values(run.scores) if run.headline else ()
    return all(map(math.isfinite, (*run.scores.loss, *values)))


def _scores_by_group_and_seed(
    runs: Sequence[_ScoredRun], get_scores: Callable[[_ScoredRun], Sequence[float]]
) -> dict[RunGroup, dict[Seed, _Array]]:
    """Return scores by group and seed; the mean if a seed was run several times."""
    scores: dict[RunGroup, dict[Seed, list[Sequence[float]]]] = {}
    for run in runs:
        scores.setdefault(run.group, {}).setdefault(seed_of(run.record), []).append(get_scores(run))
    return {
        one: {seed: numpy.asarray(repeats, dtype=float).mean(axis=0) for seed, repeats in seeds.items()}
        for one, seeds in scores.items()
    }


def _most_common(values: Iterable[tuple[RunGroup, _T]]) -> _T | None:
    """Return the value that most groups have; None if there are no values."""
    common = Counter(value for _, value in dict.fromkeys(values)).most_common(1)
    return common[0][0] if common else None


def _filter_runs(
    runs: list[_ScoredRun], exclusion_notes: list[str], predicate: Callable[[_ScoredRun], bool], reason: str
) -> list[_ScoredRun]:
    """Return the runs that satisfy ``predicate``, and add a note on the others."""
    included = [run for run in runs if predicate(run)]
    if len(included) < len(runs):
        included_ids = set(map(id, included))
        _add_note(exclusion_notes, (run.group for run in runs if id(run) not in included_ids), reason)
    return included


def _add_note(exclusion_notes: list[str], groups: Iterable[RunGroup], reason: str) -> None:
    """Add one note on ``groups``, if there are any."""
    labels = list(dict.fromkeys(one.label for one in groups))
    if labels:
        exclusion_notes.append(f"{reason}: {join_with_and(truncate_list(labels))}")
