"""Runs side by side."""

from __future__ import annotations

import pytest

from peftbench.errors import UnknownKeyError
from peftbench.record import Outcome
from peftbench.report.tables.pivot import rows_by_setting, seed_rows
from tests.unit.report.records import record


def test_over_seeds_groups_what_differs_in_seeds_alone() -> None:
    """Mean, standard deviation and t's interval (4.3027 / sqrt(3) to either side, rounded outward) over three seeds.

    A run of another recipe is not mixed in.
    """
    rows = [record(f"lora-seed={s}", "lora", 10, seed=s, loss=loss) for s, loss in enumerate((1.0, 2.0, 3.0))]
    (row,) = seed_rows([*rows, record("b", "full", 1000)])
    assert row == {
        "method": "lora",
        "seeds": "3",
        "held-out loss": "2.000 ± 1.000 (-0.485–4.485)",
        "ROUGE-L": "31.2 ± 0.0 (31.2–31.3)",
    }


def test_a_seed_counts_once() -> None:
    """``full`` of seed 0, run twice, is one seed beside 1 and 2: by hand, of 1 and 3, 2 and 3, the mean of three."""
    runs = [("full", 0, 1.0), ("full-seed=0", 0, 3.0), ("full-seed=1", 1, 2.0), ("full-seed=2", 2, 3.5)]
    (row,) = seed_rows([record(name, "full", 9, seed=seed, loss=loss) for name, seed, loss in runs])
    assert row["seeds"] == "3"
    assert row["held-out loss"].startswith("2.500 ± 0.866 (")


def test_by_knob_is_a_row_a_method_and_a_column_a_value() -> None:
    """Each loss stands under its value, the lowest is bold, and a run without one shows how it ended."""
    rows = [
        record(f"l{batch}", "lora", 10, global_batch_size=batch, loss=loss) for batch, loss in ((16, 2.0), (2, 1.5))
    ]
    rows += [record("f2", "full", 1000, global_batch_size=2, loss=1.0)]
    rows += [record("f16", "full", 1000, global_batch_size=16, quality=None, outcome=Outcome(kind="diverged", step=3))]
    assert rows_by_setting(rows, "train.global_batch_size") == [
        {"method": "lora", "2": "**1.500**", "16": "2.000"},
        {"method": "full", "2": "**1.000**", "16": "diverged"},
    ]


@pytest.mark.parametrize("knob", ["train.globel_batch_size", "train.seed.x", "nothing"])
def test_a_knob_that_no_run_has(knob: str) -> None:
    """A misspelt knob is told in one sentence."""
    with pytest.raises(UnknownKeyError, match=knob):
        rows_by_setting([record("a", "lora", 10)], knob)


def test_a_loss_that_is_no_number_is_no_figure() -> None:
    """A diverged run neither breaks the mean over seeds nor wins a search; its outcome stands in its place."""
    bad = record("a2", "lora", 10, seed=2, loss=float("nan"), outcome=Outcome(kind="diverged", step=5))
    rows = [record(f"a{s}", "lora", 10, seed=s, loss=loss) for s, loss in enumerate((1.0, 2.0))]
    (over,) = seed_rows([bad, *rows])
    assert over["held-out loss"].startswith("1.500 ± 0.707 (")
    (by,) = rows_by_setting([bad, *rows], "train.seed")
    assert by == {"method": "lora", "0": "**1.000**", "1": "2.000", "2": "diverged"}
