"""Significance of differences between groups of runs, and notes on runs that cannot be compared."""

from __future__ import annotations

import math

import numpy
import pytest
from scipy.stats import t

from peftbench.evaluation.intervals import paired_interval
from peftbench.record import Outcome, RunRecord
from peftbench.report.analysis.significance import MIN_EXAMPLES, PairComparison, compare_groups
from tests.helpers.scores import DEFINITIONS
from tests.unit.report.records import build_judged_record, build_record, draw_scores

COUNT = 60
BASE = draw_scores(COUNT, 0, spread=10)


def scores(shift: float, seed: int, spread: float = 3.0, count: int = COUNT) -> list[float]:
    """Return scores that correlate with BASE and whose mean differs by about ``shift``."""
    return [base + shift + value - 30 for base, value in zip(BASE, draw_scores(count, seed, spread), strict=False)]


def build_seeds(name: str, kind: str, shifts: list[float], noise_seed: int) -> list[RunRecord]:
    """Build one run per seed, each with its own shift of the mean."""
    return [
        build_judged_record(f"{name}-seed={s}", kind, scores(shift, noise_seed + s), seed=s)
        for s, shift in enumerate(shifts)
    ]


def test_pair_matches_paired_interval() -> None:
    """Compare the mean difference and its interval with those of the per-example differences; there is one seed."""
    first, second = scores(4, 1), scores(0, 2)
    (pair,) = compare_groups(
        [build_judged_record("a", "lora", first), build_judged_record("b", "full", second)]
    ).pair_comparisons
    expected = paired_interval([a - b for a, b in zip(first, second, strict=True)])
    assert (pair.first.label, pair.second.label) == ("a (lora)", "b (full)")
    assert pair.mean_difference == pytest.approx(numpy.mean(first) - numpy.mean(second))
    assert (pair.interval.low, pair.interval.high) == pytest.approx((expected.low, expected.high))
    assert (pair.seeds, pair.single_seed, pair.num_examples, pair.num_comparisons) == (((0, 0),), 0, COUNT, 1)
    assert pair.is_significant
    assert pair.better_group is pair.first


def test_interval_joins_examples_and_seeds() -> None:
    """Compute the interval by hand: half-widths over examples and over seeds, as the root of their squares' sum."""
    lora, full = build_seeds("lora", "lora", [4, 5, 6], 10), build_seeds("full", "full", [0, 0, 0], 20)
    (pair,) = compare_groups([*lora, *full[::-1]]).pair_comparisons
    first = numpy.array([scores(shift, 10 + s) for s, shift in enumerate((4, 5, 6))])
    second = numpy.array([scores(0, 20 + s) for s in range(3)])
    variances = numpy.array([one.mean(axis=1).var(ddof=1) for one in (first, second)])
    degrees_of_freedom = variances.sum() ** 2 / (variances**2 / 2).sum()
    over_seeds = t.isf(0.025, degrees_of_freedom) * math.sqrt(variances.sum() / 3)
    over_examples = paired_interval(list((first - second).mean(axis=0)))
    assert [seed for seed, _ in pair.seeds] == [0, 1, 2]
    assert pair.single_seed is None
    assert (pair.interval.low, pair.interval.high) == pytest.approx(
        (
            over_examples.mean - math.hypot(over_examples.mean - over_examples.low, over_seeds),
            over_examples.mean + math.hypot(over_examples.high - over_examples.mean, over_seeds),
        )
    )


def test_variance_over_seeds_is_pooled_over_methods() -> None:
    """Two methods with equal means in each seed get the average variance of all methods, and a wider interval."""
    steady = [*build_seeds("a", "lora", [4, 4, 4], 10), *build_seeds("b", "full", [0, 0, 0], 10)]
    volatile = build_seeds("c", "last_layer", [-9, 0, 9], 10)
    comparisons = compare_groups([*steady, *volatile])
    first, second, third = comparisons.groups
    pair, wider = comparisons.between(first, second), comparisons.between(first, third)
    assert pair is not None
    assert wider is not None
    variances = [numpy.mean(rows, axis=1).var(ddof=1) for rows in _scores_of([4, 4, 4], [0, 0, 0], [-9, 0, 9])]
    degrees_of_freedom = sum(variances) ** 2 / sum(one**2 / 2 for one in variances)
    far = t.isf(0.05 / 6, degrees_of_freedom)
    assert (pair.interval.high - pair.interval.low) / 2 == pytest.approx(far * math.sqrt(2 * numpy.mean(variances) / 3))
    assert (wider.interval.high - wider.interval.low) / 2 > far * math.sqrt(variances[2] / 3)


def _scores_of(*shifts: list[int]) -> list[list[list[float]]]:
    return [[scores(shift, 10 + seed) for seed, shift in enumerate(one)] for one in shifts]


def test_difference_caused_by_one_seed_is_not_significant() -> None:
    """The differences of the examples' means over seeds are significant, but those of the seeds vary too much."""
    lora, full = build_seeds("lora", "lora", [12, 0, 0], 10), build_seeds("full", "full", [0, 0, 0], 20)
    (pair,) = compare_groups([*lora, *full]).pair_comparisons
    differences = numpy.mean(_scores_of([12, 0, 0]), axis=1)[0] - numpy.mean(
        [scores(0, 20 + s) for s in range(3)], axis=0
    )
    assert paired_interval(list(differences)).low > 0
    assert pair.interval.low < 0 < pair.interval.high
    assert not pair.is_significant
    assert pair.better_group is None


def test_number_of_sufficient_seeds_is_the_smallest() -> None:
    """Run the advised number of seeds with the same means and variances: it is significant, one fewer is not."""
    comparisons = {count: _compare_alternating(count) for count in range(2, 11)}
    advised = comparisons[2].sufficient_seeds
    assert advised is not None
    assert 2 < advised <= 10
    assert [comparisons[count].is_significant for count in (advised - 1, advised)] == [False, True]
    assert comparisons[advised].sufficient_seeds is None
    assert comparisons[2].verdict == f"not significant; use {advised} seeds"


def _compare_alternating(count: int) -> PairComparison:
    """Compare two methods over ``count`` seeds whose means have the same average and variance for any ``count``."""
    offsets = numpy.resize([-1.0, 1.0], count)
    offsets = 4 * (offsets - offsets.mean()) / offsets.std(ddof=1)
    rows = [
        build_judged_record(f"{kind}-seed={s}", kind, scores(shift + offset, 10), seed=s)
        for kind, shift in (("lora", 6), ("full", 0))
        for s, offset in enumerate(offsets)
    ]
    (pair,) = compare_groups(rows).pair_comparisons
    return pair


def test_no_seeds_are_advised_if_examples_are_missing() -> None:
    """More seeds do not help if the examples' differences contain zero, or if there are fewer than 20 examples."""
    small = [*build_seeds("lora", "lora", [-0.2, 0.2], 10), *build_seeds("full", "full", [0, 0], 20)]
    few = [
        build_judged_record(f"{kind}-seed={s}", kind, scores(shift, 3, count=10), seed=s)
        for kind, shifts in (("lora", (9, 3)), ("full", (0, 0)))
        for s, shift in enumerate(shifts)
    ]
    for rows, verdict in ((small, "not significant"), (few, "too few examples")):
        (pair,) = compare_groups(rows).pair_comparisons
        assert not pair.is_significant
        assert (pair.sufficient_seeds, pair.verdict) == (None, verdict)


def test_intervals_are_corrected_for_all_pairs() -> None:
    """Compare the intervals of four configurations with those of confidence 1 - 0.05 / 6, for six pairs."""
    rows = [build_judged_record(str(i), "lora", scores(i, i), global_batch_size=i + 1) for i in range(4)]
    comparisons = compare_groups(rows)
    assert (len(comparisons.pair_comparisons), comparisons.num_comparisons) == (6, 6)
    for pair in comparisons.pair_comparisons:
        both = (scores(int(group.label[0]), int(group.label[0])) for group in (pair.first, pair.second))
        expected = paired_interval([a - b for a, b in zip(*both, strict=True)], confidence=1 - 0.05 / 6)
        assert (pair.interval.low, pair.interval.high) == pytest.approx((expected.low, expected.high))


def test_loss_is_weighted_by_tokens_and_lower_is_better() -> None:
    """Without summaries, compare nats per labeled token."""
    tokens = [5 + i % 7 for i in range(COUNT)]
    lora_losses = [3.0 * n + 0.1 * (i % 3) for i, n in enumerate(tokens)]
    full_losses = [3.1 * n for n in tokens]
    (pair,) = compare_groups(
        [
            build_judged_record("full", "full", None, losses=full_losses, labeled=tokens),
            build_judged_record("lora", "lora", None, losses=lora_losses, labeled=tokens),
        ]
    ).pair_comparisons
    assert pair.metric.unit == "nats"
    assert pair.first.label == "lora"
    assert pair.mean_difference == pytest.approx(sum(lora_losses) / sum(tokens) - 3.1)
    assert pair.mean_difference < 0
    assert pair.better_group is pair.first


def test_baseline_is_paired_with_every_seed() -> None:
    """Pair the single run of a baseline with all three seeds, whatever its own seed is."""
    lora = build_seeds("lora", "lora", [4, 5, 6], 10)
    comparisons = compare_groups(
        [
            *lora,
            build_judged_record("base", "zero_shot", scores(0, 5), seed=9),
            build_judged_record("lead", "lead", scores(1, 6)),
        ]
    )
    assert sorted(len(pair.seeds) for pair in comparisons.pair_comparisons) == [0, 3, 3]
    assert comparisons.exclusion_notes == ()


def test_only_common_seeds_are_paired() -> None:
    """Pair two seeds of 0, 1, 2 and 1, 2; report configurations without a common seed."""
    lora, full = build_seeds("lora", "lora", [4, 5, 6], 10), build_seeds("full", "full", [0, 0, 0], 20)
    (pair,) = compare_groups([*lora, *full[1:]]).pair_comparisons
    assert [seed for seed, _ in pair.seeds] == [1, 2]
    comparisons = compare_groups([lora[0], *full[1:]])
    assert comparisons.pair_comparisons == ()
    assert comparisons.exclusion_notes == ("lora-seed=0 and full have no common seed and are not compared",)


def test_swapping_groups_negates_the_difference() -> None:
    """Check that the interval is negated and that the better group is the same."""
    comparisons = compare_groups(
        [*build_seeds("lora", "lora", [4, 5, 6], 10), *build_seeds("full", "full", [0, 0, 0], 20)]
    )
    lora, full = comparisons.groups
    forward, swapped = comparisons.between(lora, full), comparisons.between(full, lora)
    assert forward is not None
    assert swapped is not None
    assert (forward.mean_difference, forward.interval.low, forward.interval.high) == (
        -swapped.mean_difference,
        -swapped.interval.high,
        -swapped.interval.low,
    )
    assert forward.better_group is swapped.better_group is lora
    assert comparisons.between(lora, lora) is None


def test_significance_needs_min_examples() -> None:
    """Check that any difference over 19 examples is not significant, and that one over 20 can be."""
    for count, significant in ((MIN_EXAMPLES - 1, False), (MIN_EXAMPLES, True)):
        rows = [
            build_judged_record("a", "lora", scores(40, 1, count=count)),
            build_judged_record("b", "full", scores(0, 2, count=count)),
        ]
        (pair,) = compare_groups(rows).pair_comparisons
        assert pair.interval.low > 0
        assert pair.is_significant is significant
        assert pair.verdict == ("a (lora) is better on seed 0" if significant else "too few examples")
    (pair,) = compare_groups(
        [build_judged_record("a", "lora", scores(0, 1)), build_judged_record("b", "full", scores(0, 2))]
    ).pair_comparisons
    assert pair.verdict == "not significant on seed 0"


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_examples_are_not_significant(count: int) -> None:
    """Report that one example has no interval; two examples have one, which is not significant."""
    comparisons = compare_groups(
        [build_judged_record("a", "lora", [40.0, 42.0][:count]), build_judged_record("b", "full", [30.0, 31.0][:count])]
    )
    assert [pair.verdict for pair in comparisons.pair_comparisons] == ["too few examples"] * (count - 1)
    assert (len(comparisons.exclusion_notes), comparisons.num_examples, comparisons.has_bootstrap_intervals) == (
        2 - count,
        count,
        False,
    )
    assert comparisons.metric is not None
    assert comparisons.metric.score_name == "rougeL"


def test_runs_with_different_headline_metrics_are_compared_by_loss() -> None:
    """Name each metric with its runs; all runs have held-out losses."""
    losses, labeled = [3.0, 4.0] * 15, [1] * 30
    rows = [
        build_judged_record(name, name, scores(index, index), losses=losses, labeled=labeled)
        for index, name in enumerate(("full", "lora"))
    ]
    quality = rows[1].quality
    assert quality is not None
    assert quality.per_example is not None
    renamed = {"exact_match": quality.metrics["rougeL"].model_copy(update={"definition": DEFINITIONS["exact_match"]})}
    per_example = quality.per_example.model_copy(update={"metrics": {"exact_match": tuple(scores(1, 1))}})
    changes = {"metrics": renamed, "headline_metric": "exact_match", "per_example": per_example}
    rows[1] = rows[1].model_copy(update={"quality": quality.model_copy(update=changes)})
    comparisons = compare_groups(rows)
    assert comparisons.metric is not None
    assert comparisons.metric.name == "held-out loss"
    assert comparisons.exclusion_notes[0] == (
        "All runs are compared by held-out loss, because their headline metrics differ: ROUGE-L of full; "
        "exact match of lora"
    )


def test_metric_without_comparisons() -> None:
    """Use ROUGE-L if all runs with a known quality have it, else the loss; None if no quality is known."""
    with_rouge = build_record("older", "full", 10)
    assert with_rouge.quality is not None
    quality_without_rouge = with_rouge.quality.model_copy(update={"metrics": {}})
    without_rouge = build_record("mute", "lora", 10, quality=quality_without_rouge)
    oom = build_record("ended", "lora", 10, quality=None, method={"x": 1}, outcome=Outcome(kind="oom"))
    for rows, key in (
        ([GOOD], "rougeL"),
        ([with_rouge, oom], "rougeL"),
        ([with_rouge, without_rouge, GOOD], None),
        ([without_rouge], None),
    ):
        comparisons = compare_groups(rows)
        assert comparisons.pair_comparisons == ()
        assert comparisons.metric is not None
        assert comparisons.metric.score_name == key
    assert compare_groups([oom]).metric is None


def test_more_than_ten_configurations_compare_best_of_each_method() -> None:
    """Compare the best of three methods among twelve configurations, corrected for all 66 pairs."""
    kinds = ("lora", "full", "last_layer")
    rows = [build_judged_record(f"{kinds[i % 3]}-{i}", kinds[i % 3], scores(i, i), method={"i": i}) for i in range(12)]
    comparisons = compare_groups(rows)
    assert [group.label for group in comparisons.comparable_groups[:3]] == ["last_layer-11", "full-10", "lora-9"]
    assert [(pair.first.label, pair.second.label) for pair in comparisons.pair_comparisons] == [
        ("last_layer-11", "full-10"),
        ("last_layer-11", "lora-9"),
        ("full-10", "lora-9"),
    ]
    assert {pair.num_comparisons for pair in comparisons.pair_comparisons} == {66}
    assert "corrected for all 66 pairs" in comparisons.exclusion_notes[0]


OLD = build_record("old", "lora", 10)
GOOD = build_judged_record("good", "full", scores(0, 1))


@pytest.mark.parametrize(
    ("other", "note"),
    [
        (OLD, "Not compared, no per-example scores in the record: old (lora)"),
        (
            build_judged_record("odd", "lora", scores(0, 2), identity="others"),
            "Not compared, evaluated on different examples than most: odd (lora)",
        ),
        (
            build_judged_record("short", "lora", scores(0, 2)[:-1]),
            "Not compared, a different number of scores than most: short (lora)",
        ),
        (
            build_judged_record("none", "lora", None, losses=[math.nan] * COUNT, labeled=[1] * COUNT),
            "Not compared, a score is not finite: none (lora)",
        ),
    ],
)
def test_unpairable_run_is_reported(other: RunRecord, note: str) -> None:
    """Report the run in one note, and compare the others."""
    comparisons = compare_groups([GOOD, build_judged_record("best", "last_layer", scores(3, 4)), other])
    assert [(pair.first.method_kind, pair.second.method_kind) for pair in comparisons.pair_comparisons] == [
        ("last_layer", "full")
    ]
    (exclusion_note,) = comparisons.exclusion_notes
    assert note in exclusion_note


def test_losses_over_different_tokens_are_not_compared() -> None:
    """Exclude a loss whose tokenizer gives other token counts."""
    losses, tokens = [9.0] * COUNT, [3] * COUNT
    rows = [build_judged_record(name, name, None, losses=losses, labeled=tokens) for name in ("full", "lora")]
    comparisons = compare_groups(
        [*rows, build_judged_record("last_layer", "last_layer", None, losses=losses, labeled=[4] * COUNT)]
    )
    assert len(comparisons.pair_comparisons) == 1
    assert comparisons.exclusion_notes[0].startswith("Not compared, losses over different tokens than most")


def test_runs_are_compared_by_loss_if_one_has_no_summaries() -> None:
    """Note which runs have no summaries, and which baseline is left out because it has no loss."""
    tokens = [4] * COUNT
    rows = [
        build_judged_record("full", "full", scores(0, 1), losses=[9.0] * COUNT, labeled=tokens),
        build_judged_record("lora", "lora", None, losses=[8.0] * COUNT, labeled=tokens),
        build_judged_record("lead_1", "lead", scores(0, 2)),
    ]
    comparisons = compare_groups(rows)
    assert comparisons.metric is not None
    assert comparisons.metric.unit == "nats"
    assert comparisons.exclusion_notes == (
        "All runs are compared by held-out loss, because these have no ROUGE-L: lora",
        "Not compared, no held-out loss: lead_1",
    )


def test_preempted_run_is_not_compared() -> None:
    """Exclude a preempted run even if its record contains scores."""
    comparisons = compare_groups(
        [GOOD, build_judged_record("lora", "lora", scores(9, 2), outcome=Outcome(kind="preempted"))]
    )
    assert (comparisons.pair_comparisons, [group.label for group in comparisons.groups]) == (
        (),
        ["good (full)", "lora"],
    )


def test_zero_or_one_record_gives_no_comparison() -> None:
    """Check that the note gives the reason."""
    assert compare_groups([]).pair_comparisons == ()
    assert compare_groups([GOOD]).pair_comparisons == ()
    assert "no two configurations" in compare_groups([GOOD]).exclusion_notes[0]


@pytest.mark.parametrize(("examples", "spread"), [(20, "normal"), (60, "skewed")])
def test_false_positives_stay_within_stated_level(examples: int, spread: str) -> None:
    """Compare four equally good methods in 200 tables: 5 % have a significant pair, about 20 % uncorrected."""
    false_positives = 0
    for draw in range(200):
        random = numpy.random.default_rng(draw)
        samples = random.normal(size=(4, examples)) if spread == "normal" else random.gamma(1.0, size=(4, examples))
        rows = [
            build_judged_record(str(i), "lora", list(values), global_batch_size=i + 1)
            for i, values in enumerate(samples)
        ]
        false_positives += any(pair.is_significant for pair in compare_groups(rows).pair_comparisons)
    assert 1 <= false_positives <= 16
