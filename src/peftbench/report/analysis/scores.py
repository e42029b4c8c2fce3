"""The scores that can be compared: of one figure, of the same examples, by configuration and seed."""

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

Array = NDArray[numpy.float64]

_T = TypeVar("_T")


@dataclass(frozen=True)
class QualityMetric:
    """What is compared."""

    key: Literal["rougeL", "loss"]
    """Which it is, whatever it is called."""
    name: str
    unit: str
    decimals: int
    """Behind the point, where a bound needs no more."""
    higher_is_better: bool
    max_difference: float
    """Two cannot be further apart, so that an interval that reaches there says nothing."""


ROUGE_L = QualityMetric(
    "rougeL", "ROUGE-L of generated summaries", "ROUGE-L", 1, higher_is_better=True, max_difference=100
)
HELD_OUT_LOSS = QualityMetric("loss", "held-out loss", "nats", 3, higher_is_better=False, max_difference=math.inf)


@dataclass(frozen=True)
class Scores:
    """Scores (examples,) by configuration and seed, of one figure and the same examples."""

    metric: QualityMetric | None = None
    weights: Array = field(default_factory=lambda: numpy.ones(0))
    """(examples,): the labelled tokens of a loss, summed; ones of ROUGE."""
    by_group_and_seed: dict[RunGroup, dict[Seed, Array]] = field(default_factory=dict)
    exclusion_notes: tuple[str, ...] = ()
    """A sentence for each reason why runs are not among them."""

    @property
    def num_examples(self) -> int:
        """How many there are."""
        return len(self.weights)

    def mean(self, group: RunGroup) -> float:
        """Of a configuration, over its seeds, in the figure's unit."""
        return statistics.fmean(
            float(score.sum() / self.weights.sum()) for score in self.by_group_and_seed[group].values()
        )


@dataclass(frozen=True)
class _ScoredRun:
    group: RunGroup
    record: RunRecord
    scores: PerExample


def collect_scores(groups: Sequence[RunGroup]) -> Scores:
    """What can be compared of the runs that ended well: by ROUGE-L where all of them have it, else by held-out loss.

    Of several sets of examples it is the one that most configurations were judged on.
    """
    told: list[str] = []
    judged = [(one, run, run.quality) for one in groups for run in one.ok_runs if run.quality is not None]
    runs = [_ScoredRun(one, run, found.per_example) for one, run, found in judged if found.per_example is not None]
    _add_note(
        told,
        (one for one, _, found in judged if found.per_example is None),
        "Without scores by example, as older records are, and so not compared",
    )
    runs = _filter_runs(runs, told, _has_finite_scores, "With a score that is no number, and so not compared")
    most = _most_common((run.group, run.scores.examples_fingerprint) for run in runs)
    runs = _filter_runs(
        runs,
        told,
        lambda run: run.scores.examples_fingerprint == most,
        "Evaluated on other examples than most, and so not compared",
    )
    if runs and all("rougeL" in run.scores.rouge for run in runs):
        return _collect_rouge_scores(runs, told)
    return _collect_loss_scores(runs, told)


def _collect_rouge_scores(runs: list[_ScoredRun], exclusion_notes: list[str]) -> Scores:
    length = _most_common((run.group, len(run.scores.rouge["rougeL"])) for run in runs)
    runs = _filter_runs(
        runs,
        exclusion_notes,
        lambda run: len(run.scores.rouge["rougeL"]) == length,
        "With another number of scores than most, and so not compared",
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
        _add_note(exclusion_notes, without, "Without summaries, so that all are compared by held-out loss")
    runs = _filter_runs(
        runs,
        exclusion_notes,
        lambda run: bool(run.scores.loss),
        "Without a held-out loss, by which the others are compared",
    )
    tokens = _most_common((run.group, run.scores.labelled_tokens) for run in runs)
    runs = _filter_runs(
        runs,
        exclusion_notes,
        lambda run: run.scores.labelled_tokens == tokens and len(run.scores.loss) == len(tokens),
        "With losses over other tokens than most, as of another tokenizer, and so not compared",
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
) -> dict[RunGroup, dict[Seed, Array]]:
    """Scores by configuration and seed; where a seed was run twice, their mean."""
    found: dict[RunGroup, dict[Seed, list[Sequence[float]]]] = {}
    for run in runs:
        found.setdefault(run.group, {}).setdefault(seed_of(run.record), []).append(get_scores(run))
    return {
        one: {seed: numpy.asarray(same, dtype=float).mean(axis=0) for seed, same in seeds.items()}
        for one, seeds in found.items()
    }


def _most_common(values: Iterable[tuple[RunGroup, _T]]) -> _T | None:
    """What most configurations have; None where there are none."""
    common = Counter(what for _, what in dict.fromkeys(values)).most_common(1)
    return common[0][0] if common else None


def _filter_runs(
    runs: list[_ScoredRun], exclusion_notes: list[str], predicate: Callable[[_ScoredRun], bool], reason: str
) -> list[_ScoredRun]:
    """The good ones, and a sentence on the others."""
    kept = [run for run in runs if predicate(run)]
    if len(kept) < len(runs):
        stay = set(map(id, kept))
        _add_note(exclusion_notes, (run.group for run in runs if id(run) not in stay), reason)
    return kept


def _add_note(exclusion_notes: list[str], groups: Iterable[RunGroup], reason: str) -> None:
    """One sentence on some configurations, if there are any."""
    labels = list(dict.fromkeys(one.label for one in groups))
    if labels:
        exclusion_notes.append(f"{reason}: {join_with_and(truncate_list(labels))}")
