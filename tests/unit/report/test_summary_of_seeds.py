"""The summary of runs with several seeds: which seeds a statement is about, and how many are missing."""

from __future__ import annotations

import re

from peftbench.report.analysis.significance import compare_groups
from peftbench.report.summary import summarize
from tests.unit.report.test_summary import COUNT, build_seeds, find_verdicts


def test_difference_must_be_shared_by_seeds() -> None:
    """Call a difference significant if three seeds share it, but not if one of three seeds causes it."""
    sentences = summarize([*build_seeds("full", "full", [0, 0, 0]), *build_seeds("lora", "lora", [5.5, 6, 6.5])])
    assert sentences[1].startswith("lora is better than full by 6.0 ROUGE-L (interval 4.")
    assert sentences[-1].endswith(
        f"paired bootstrap over {COUNT} held-out examples and 3 seeds together, with a variance over seeds pooled over "
        "methods."
    )
    one_outlier = [*build_seeds("full", "full", [0, 0, 0]), *build_seeds("lora", "lora", [12, 0, 0])]
    assert find_verdicts(summarize(one_outlier)) == []
    assert re.match(r"lora is within \d\d\.\d ROUGE-L of full \(", summarize(one_outlier)[1])


def test_number_of_missing_seeds_is_advised() -> None:
    """Advise the number of seeds if they are missing, and none if the examples' differences contain zero."""
    runs = [*build_seeds("full", "full", [0, 0, 0]), *build_seeds("lora", "lora", [8, 4, 0])]
    (pair,) = compare_groups(runs).pair_comparisons
    assert pair.sufficient_seeds is not None
    assert f"; not significant with 3 seeds; use {pair.sufficient_seeds} seeds)" in summarize(runs)[1]
    without_difference = [*build_seeds("full", "full", [0, 0, 0]), *build_seeds("lora", "lora", [4, 0, -4])]
    assert summarize(without_difference)[1].endswith("; not significant).")


def test_pairs_with_one_seed_keep_the_seed_warning() -> None:
    """Name the seed of pairs with one seed, and warn that another may change their order."""
    rows = [
        *build_seeds("full", "full", [0, 0, 0]),
        *build_seeds("lora", "lora", [6, 6, 6]),
        *build_seeds("head", "last_layer", [6]),
    ]
    sentences = summarize(rows)
    assert sentences[-1].endswith(
        f"over {COUNT} held-out examples and 3 seeds together, with a variance over seeds pooled over methods; "
        "comparisons on seed 0 are over examples only; another seed may change the order: use 3 seeds."
    )
    better = [sentence for sentence in sentences if " is better than full by 6.0 ROUGE-L" in sentence]
    assert [" on seed 0 (" in sentence for sentence in better] == ["head" in sentence for sentence in better]
    assert len(better) == 2


def test_pairs_with_different_numbers_of_seeds_name_both() -> None:
    """State the smallest and the largest number of seeds of the pairs."""
    rows = [
        *build_seeds("full", "full", [0, 0, 0]),
        *build_seeds("lora", "lora", [6, 6, 6]),
        *build_seeds("head", "last_layer", [6, 6]),
    ]
    assert f"over {COUNT} held-out examples and 2 to 3 seeds together" in summarize(rows)[-1]


def test_pairs_of_different_single_seeds_are_not_given_one() -> None:
    """State that there is one seed each if the seeds of the pairs differ, and name the seed of each pair."""
    rows = [
        *build_seeds("full", "full", [0, 0]),
        *build_seeds("lora", "lora", [6, 6])[:1],
        *build_seeds("head", "last_layer", [6, 6])[1:],
    ]
    sentences = summarize(rows)
    assert any("better than full by 6.0 ROUGE-L on seed 0 (" in sentence for sentence in sentences)
    assert any("better than full by 6.0 ROUGE-L on seed 1 (" in sentence for sentence in sentences)
    assert any("held-out examples on one seed each; another seed may" in sentence for sentence in sentences)


def test_interval_wider_than_scale_gives_no_bound() -> None:
    """State no bound if two seeds give an interval wider than the scale of ROUGE-L, which ends at 100."""
    sentences = summarize([*build_seeds("full", "full", [0, 0]), *build_seeds("lora", "lora", [24, -16])])
    assert sentences[1] == (
        f"lora and full are indistinguishable (difference +4.0; with {COUNT} examples and 2 seeds the interval exceeds "
        "the metric's range)."
    )
