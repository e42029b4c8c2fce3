"""What differs beyond chance, and what cannot be compared."""

from __future__ import annotations

import math

import numpy
import pytest
from scipy.stats import t

from peftbench.evaluation.intervals import paired_interval
from peftbench.record import Outcome, RunRecord
from peftbench.report.analysis.significance import MIN_EXAMPLES, compare_groups
from tests.unit.report.records import judged, noise, record

COUNT = 60
BASE = noise(COUNT, 0, spread=10)


def scores(off: float, seed: int, spread: float = 3.0, count: int = COUNT) -> list[float]:
    """Of a method that is ``off`` from another, which finds the same examples hard."""
    return [base + off + one - 30 for base, one in zip(BASE, noise(count, seed, spread), strict=False)]


def by_seed(name: str, kind: str, offs: list[float], first: int) -> list[RunRecord]:
    """A run for each seed, each its own way off."""
    return [judged(f"{name}-seed={s}", kind, scores(off, first + s), seed=s) for s, off in enumerate(offs)]


def test_one_pair_by_hand() -> None:
    """The difference of means and its interval over examples are those of the differences, and no seed tells more."""
    ours, theirs = scores(4, 1), scores(0, 2)
    (found,) = compare_groups([judged("a", "lora", ours), judged("b", "full", theirs)]).pair_comparisons
    expected = paired_interval([a - b for a, b in zip(ours, theirs, strict=True)])
    assert (found.first.label, found.second.label) == ("a (lora)", "b (full)")
    assert found.interval_over_examples.mean == pytest.approx(numpy.mean(ours) - numpy.mean(theirs))
    assert (found.interval.low, found.interval.high) == pytest.approx((expected.low, expected.high))
    assert (found.interval_over_seeds, found.num_seeds, found.num_examples, found.num_comparisons) == (
        None,
        1,
        COUNT,
        1,
    )
    assert found.is_significant
    assert found.better_group is found.first


def test_seeds_by_hand() -> None:
    """Each example's differences are averaged over seeds, and the means of seeds have t's interval of 2 degrees."""
    lora, full = by_seed("lora", "lora", [4, 5, 6], 10), by_seed("full", "full", [0, 0, 0], 20)
    (found,) = compare_groups([*lora, *full[::-1]]).pair_comparisons
    pairs = numpy.array([scores(off, 10 + s) for s, off in enumerate((4, 5, 6))]) - [
        scores(0, 20 + s) for s in range(3)
    ]
    means = pairs.mean(axis=1)
    far = t.isf(0.025, 2) * means.std(ddof=1) / math.sqrt(3)
    assert found.num_seeds == 3
    assert found.interval_over_seeds is not None
    assert (found.interval_over_seeds.low, found.interval_over_seeds.high) == pytest.approx(
        (means.mean() - far, means.mean() + far)
    )
    alone = paired_interval(list(pairs.mean(axis=0)))
    assert (found.interval_over_examples.low, found.interval_over_examples.high) == pytest.approx(
        (alone.low, alone.high)
    )
    assert found.interval.low == min(found.interval_over_examples.low, found.interval_over_seeds.low)
    assert found.interval.high == max(found.interval_over_examples.high, found.interval_over_seeds.high)


def test_a_difference_that_seeds_do_not_share_is_none() -> None:
    """Where one seed makes all of the difference, examples alone would call it real, and it is not supported."""
    lora, full = by_seed("lora", "lora", [12, 0, 0], 10), by_seed("full", "full", [0, 0, 0], 20)
    (found,) = compare_groups([*lora, *full]).pair_comparisons
    assert found.interval_over_examples.low > 0
    assert found.interval_over_seeds is not None
    assert found.interval_over_seeds.low < 0 < found.interval_over_seeds.high
    assert not found.is_significant
    assert found.better_group is None


def test_every_pair_is_corrected_for_all() -> None:
    """Four configurations are six comparisons, and each interval is that of a confidence of 1 - 0.05 / 6."""
    rows = [judged(str(i), "lora", scores(i, i), global_batch_size=i + 1) for i in range(4)]
    compared = compare_groups(rows)
    assert (len(compared.pair_comparisons), compared.num_comparisons) == (6, 6)
    for found in compared.pair_comparisons:
        both = (scores(int(one.label[0]), int(one.label[0])) for one in (found.first, found.second))
        expected = paired_interval([a - b for a, b in zip(*both, strict=True)], confidence=1 - 0.05 / 6)
        assert (found.interval.low, found.interval.high) == pytest.approx((expected.low, expected.high))


def test_a_loss_is_weighted_by_tokens_and_lower_is_better() -> None:
    """Without summaries it is the nats of all labelled tokens by their number, and the lower is the better."""
    tokens = [5 + i % 7 for i in range(COUNT)]
    ours = [3.0 * n + 0.1 * (i % 3) for i, n in enumerate(tokens)]
    theirs = [3.1 * n for n in tokens]
    (found,) = compare_groups(
        [
            judged("full", "full", None, losses=theirs, labelled=tokens),
            judged("lora", "lora", None, losses=ours, labelled=tokens),
        ]
    ).pair_comparisons
    assert found.metric.unit == "nats"
    assert found.first.label == "lora"
    assert found.mean_difference == pytest.approx(sum(ours) / sum(tokens) - 3.1)
    assert found.mean_difference < 0
    assert found.better_group is found.first


def test_a_baseline_is_paired_with_every_seed() -> None:
    """One run of what trains nothing stands beside three seeds, whatever its own seed is."""
    lora = by_seed("lora", "lora", [4, 5, 6], 10)
    compared = compare_groups(
        [*lora, judged("base", "zero_shot", scores(0, 5), seed=9), judged("lead", "lead", scores(1, 6))]
    )
    assert sorted(one.num_seeds for one in compared.pair_comparisons) == [1, 3, 3]
    assert compared.exclusion_notes == ()


def test_only_shared_seeds_are_paired() -> None:
    """Of seeds 0, 1, 2 and 1, 2 two are paired; where none is shared, that is said and nothing is guessed."""
    lora, full = by_seed("lora", "lora", [4, 5, 6], 10), by_seed("full", "full", [0, 0, 0], 20)
    (found,) = compare_groups([*lora, *full[1:]]).pair_comparisons
    assert found.num_seeds == 2
    compared = compare_groups([lora[0], *full[1:]])
    assert compared.pair_comparisons == ()
    assert compared.exclusion_notes == ("lora-seed=0 and full have no common seed and are not compared",)


def test_either_way_round() -> None:
    """The difference of b and a is that of a and b with its signs turned, and the better one is the same."""
    compared = compare_groups([*by_seed("lora", "lora", [4, 5, 6], 10), *by_seed("full", "full", [0, 0, 0], 20)])
    lora, full = compared.groups
    one, other = compared.between(lora, full), compared.between(full, lora)
    assert one is not None
    assert other is not None
    assert (one.mean_difference, one.interval.low, one.interval.high) == (
        -other.mean_difference,
        -other.interval.high,
        -other.interval.low,
    )
    assert one.better_group is other.better_group is lora
    assert compared.between(lora, lora) is None


def test_few_examples_support_nothing() -> None:
    """However large a difference, of 19 examples it is none; of 20 it may be one."""
    for count, supported in ((MIN_EXAMPLES - 1, False), (MIN_EXAMPLES, True)):
        rows = [judged("a", "lora", scores(40, 1, count=count)), judged("b", "full", scores(0, 2, count=count))]
        (found,) = compare_groups(rows).pair_comparisons
        assert found.interval.low > 0
        assert found.is_significant is supported
        assert found.verdict == ("a (lora) is better" if supported else "too few examples")
    (found,) = compare_groups([judged("a", "lora", scores(0, 1)), judged("b", "full", scores(0, 2))]).pair_comparisons
    assert found.verdict == "not significant"


@pytest.mark.parametrize("count", [1, 2])
def test_hardly_any_examples(count: int) -> None:
    """Of one example there is no interval, which is said; of two there is one, that supports nothing."""
    compared = compare_groups([judged("a", "lora", [40.0, 42.0][:count]), judged("b", "full", [30.0, 31.0][:count])])
    assert [one.verdict for one in compared.pair_comparisons] == ["too few examples"] * (count - 1)
    assert (len(compared.exclusion_notes), compared.num_examples, compared.uses_bootstrap) == (2 - count, count, False)
    assert compared.metric is not None
    assert compared.metric.key == "rougeL"


def test_the_figure_where_nothing_is_compared() -> None:
    """It is ROUGE-L where all whose quality is known have it, else the loss; of nothing known it is none."""
    older = record("older", "full", 10)
    assert older.quality is not None
    without = older.quality.model_copy(update={"rouge": None})
    mute = record("mute", "lora", 10, quality=without)
    ended = record("ended", "lora", 10, quality=None, method={"x": 1}, outcome=Outcome(kind="oom"))
    for rows, key in (([GOOD], "rougeL"), ([older, ended], "rougeL"), ([older, mute, GOOD], "loss"), ([mute], "loss")):
        compared = compare_groups(rows)
        assert compared.pair_comparisons == ()
        assert compared.metric is not None
        assert compared.metric.key == key
    assert compare_groups([ended]).metric is None


def test_more_than_ten_are_the_best_of_each_method() -> None:
    """Of twelve configurations of three methods the three best are compared, and corrected for all 66 pairs."""
    kinds = ("lora", "full", "last_layer")
    rows = [judged(f"{kinds[i % 3]}-{i}", kinds[i % 3], scores(i, i), method={"i": i}) for i in range(12)]
    compared = compare_groups(rows)
    assert [one.label for one in compared.comparable_groups[:3]] == ["last_layer-11", "full-10", "lora-9"]
    assert [(one.first.label, one.second.label) for one in compared.pair_comparisons] == [
        ("last_layer-11", "full-10"),
        ("last_layer-11", "lora-9"),
        ("full-10", "lora-9"),
    ]
    assert {one.num_comparisons for one in compared.pair_comparisons} == {66}
    assert "corrected for all 66 pairs" in compared.exclusion_notes[0]


OLD = record("old", "lora", 10)
GOOD = judged("good", "full", scores(0, 1))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (OLD, "Not compared, no per-example scores in the record: old (lora)"),
        (
            judged("odd", "lora", scores(0, 2), identity="others"),
            "Not compared, evaluated on different examples than most: odd (lora)",
        ),
        (
            judged("short", "lora", scores(0, 2)[:-1]),
            "Not compared, a different number of scores than most: short (lora)",
        ),
        (
            judged("none", "lora", None, losses=[math.nan] * COUNT, labelled=[1] * COUNT),
            "Not compared, a score is not finite: none (lora)",
        ),
    ],
)
def test_what_cannot_be_paired_is_said(other: RunRecord, words: str) -> None:
    """In one sentence; what can be is compared as if the other were not there."""
    compared = compare_groups([GOOD, judged("best", "last_layer", scores(3, 4)), other])
    assert [(one.first.method_kind, one.second.method_kind) for one in compared.pair_comparisons] == [
        ("last_layer", "full")
    ]
    (why,) = compared.exclusion_notes
    assert words in why


def test_losses_of_other_tokens_do_not_compare() -> None:
    """Nats by tokens of two tokenizers are two figures."""
    nats, one = [9.0] * COUNT, [3] * COUNT
    rows = [judged(name, name, None, losses=nats, labelled=one) for name in ("full", "lora")]
    compared = compare_groups([*rows, judged("last_layer", "last_layer", None, losses=nats, labelled=[4] * COUNT)])
    assert len(compared.pair_comparisons) == 1
    assert compared.exclusion_notes[0].startswith("Not compared, losses over different tokens than most")


def test_where_one_wrote_nothing_all_are_compared_by_loss() -> None:
    """ROUGE-L is the figure only if all have it, and a baseline without a loss is then left out, which is said."""
    tokens = [4] * COUNT
    rows = [
        judged("full", "full", scores(0, 1), losses=[9.0] * COUNT, labelled=tokens),
        judged("lora", "lora", None, losses=[8.0] * COUNT, labelled=tokens),
        judged("lead_1", "lead", scores(0, 2)),
    ]
    compared = compare_groups(rows)
    assert compared.metric is not None
    assert compared.metric.unit == "nats"
    assert compared.exclusion_notes == (
        "All runs are compared by held-out loss, because these have no generated summaries: lora",
        "Not compared, no held-out loss: lead_1",
    )


def test_what_did_not_end_well_is_not_compared() -> None:
    """A run that was stopped has no figure here, even where its record holds scores."""
    compared = compare_groups([GOOD, judged("lora", "lora", scores(9, 2), outcome=Outcome(kind="preempted"))])
    assert (compared.pair_comparisons, [one.label for one in compared.groups]) == ((), ["good (full)", "lora"])


def test_of_nothing() -> None:
    """No record is no comparison, and so is one."""
    assert compare_groups([]).pair_comparisons == ()
    assert compare_groups([GOOD]).pair_comparisons == ()
    assert "no two configurations" in compare_groups([GOOD]).exclusion_notes[0]


@pytest.mark.parametrize(("examples", "spread"), [(20, "normal"), (60, "skewed")])
def test_chance_is_called_a_difference_as_seldom_as_is_said(examples: int, spread: str) -> None:
    """Of 200 tables of four methods that do not differ, at most 5 % seem to hold one; uncorrected some 20 %."""
    wrong = 0
    for draw in range(200):
        random = numpy.random.default_rng(draw)
        made = random.normal(size=(4, examples)) if spread == "normal" else random.gamma(1.0, size=(4, examples))
        rows = [judged(str(i), "lora", list(own), global_batch_size=i + 1) for i, own in enumerate(made)]
        wrong += any(one.is_significant for one in compare_groups(rows).pair_comparisons)
    assert 1 <= wrong <= 16
