"""Scores that can be compared: one metric, the same examples, by group and seed."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy
from numpy.typing import NDArray

from peftbench.record import PerExample, RunRecord
from peftbench.report.analysis.run_groups import RunGroup, Seed, seed_of
from peftbench.report.text.formatting import join_with_and, truncate_list

_Array = NDArray[numpy.float64]

_T = TypeVar("_T")


@dataclass(frozen=True)
class QualityMetric:
    """A metric of quality."""

    key: Literal["rougeL", "loss"]
    """Identifier of the metric."""
    name: str
    unit: str
    decimals: int
    """Default number of decimals."""
    higher_is_better: bool
    max_difference: float
    """Largest possible difference; an interval that reaches it is uninformative."""


ROUGE_L = QualityMetric(
    "rougeL", "ROUGE-L of generated summaries", "ROUGE-L", 1, higher_is_better=True, max_difference=100
)
HELD_OUT_LOSS = QualityMetric("loss", "held-out loss", "nats", 3, higher_is_better=False, max_difference=math.inf)


@dataclass(frozen=True)
class Scores:
    """Scores of shape (examples,) by group and seed, of one metric and the same examples."""

    metric: QualityMetric | None = None
    weights: _Array = field(default_factory=lambda: numpy.ones(0))
    """(examples,): labeled tokens of each example for a loss, ones for ROUGE."""
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


def collect_scores(groups: Sequence[RunGroup]) -> Scores:
    """Return comparable scores of the runs with outcome ok: ROUGE-L if all of them have it, else held-out loss.

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
    if runs and all("rougeL" in run.scores.rouge for run in runs):
        return _collect_rouge_scores(runs, notes)
    return _collect_loss_scores(runs, notes)


def _collect_rouge_scores(runs: list[_ScoredRun], exclusion_notes: list[str]) -> Scores:
    length = _most_common((run.group, len(run.scores.rouge["rougeL"])) for run in runs)
    runs = _filter_runs(
        runs,
        exclusion_notes,
        lambda run: len(run.scores.rouge["rougeL"]) == length,
        "Not compared, a different number of scores than most",
    )
    if not length:
        return Scores(exclusion_notes=tuple(exclusion_notes))
    return Scores(
        ROUGE_L,
        numpy.ones(length),
        _scores_by_group_and_seed(runs, lambda run: run.scores.rouge["rougeL"]),
        tuple(exclusion_notes),
    )


def _collect_loss_scores(runs: list[_ScoredRun], exclusion_notes: list[str]) -> Scores:
    if any("rougeL" in run.scores.rouge for run in runs):
        without = (run.group for run in runs if "rougeL" not in run.scores.rouge)
        _add_note(
            exclusion_notes,
            without,
            "All runs are compared by held-out loss, because these have no generated summaries",
        )
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
    return all(map(math.isfinite, (*run.scores.loss, *run.scores.rouge.get("rougeL", ()))))


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
