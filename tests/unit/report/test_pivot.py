"""Tables with one row per method: over seeds, and by the value of a key."""

from __future__ import annotations

import pytest

from peftbench.errors import UnknownKeyError
from peftbench.record import Outcome
from peftbench.report.tables.pivot import rows_by_setting, seed_rows
from tests.unit.report.records import build_record


def test_seed_rows_aggregate_runs_that_differ_in_seed() -> None:
    """Check mean, standard deviation and Student's t interval (4.3027 / sqrt(3) on each side, rounded outward).

    A run of another recipe is not included.
    """
    rows = [build_record(f"lora-seed={s}", "lora", 10, seed=s, loss=loss) for s, loss in enumerate((1.0, 2.0, 3.0))]
    (row,) = seed_rows([*rows, build_record("b", "full", 1000)])
    assert row == {
        "method": "lora",
        "seeds": "3",
        "held-out loss": "2.000 ± 1.000 (-0.485–4.485)",
        "ROUGE-L": "31.2 ± 0.0 (31.2–31.3)",
    }


def test_repeated_seed_counts_once() -> None:
    """Average two runs of seed 0, so that the values of the three seeds are 2, 2 and 3.5."""
    runs = [("full", 0, 1.0), ("full-seed=0", 0, 3.0), ("full-seed=1", 1, 2.0), ("full-seed=2", 2, 3.5)]
    (row,) = seed_rows([build_record(name, "full", 9, seed=seed, loss=loss) for name, seed, loss in runs])
    assert row["seeds"] == "3"
    assert row["held-out loss"].startswith("2.500 ± 0.866 (")


def test_rows_by_setting_have_one_column_per_value() -> None:
    """Show one row per method with the lowest loss in bold, and the outcome of a run without a loss."""
    rows = [
        build_record(f"l{batch}", "lora", 10, global_batch_size=batch, loss=loss)
        for batch, loss in ((16, 2.0), (2, 1.5))
    ]
    rows += [build_record("f2", "full", 1000, global_batch_size=2, loss=1.0)]
    rows += [
        build_record("f16", "full", 1000, global_batch_size=16, quality=None, outcome=Outcome(kind="diverged", step=3))
    ]
    assert rows_by_setting(rows, "train.global_batch_size") == [
        {"method": "lora", "2": "**1.500**", "16": "2.000"},
        {"method": "full", "2": "**1.000**", "16": "diverged"},
    ]


@pytest.mark.parametrize("key", ["train.globel_batch_size", "train.seed.x", "nothing"])
def test_unknown_key_is_refused(key: str) -> None:
    """Check that the error message names the key."""
    with pytest.raises(UnknownKeyError, match=key):
        rows_by_setting([build_record("a", "lora", 10)], key)


def test_nan_loss_is_excluded() -> None:
    """Exclude a diverged run from the mean and from the lowest loss, and show its outcome."""
    diverged = build_record("a2", "lora", 10, seed=2, loss=float("nan"), outcome=Outcome(kind="diverged", step=5))
    rows = [build_record(f"a{s}", "lora", 10, seed=s, loss=loss) for s, loss in enumerate((1.0, 2.0))]
    (seed_row,) = seed_rows([diverged, *rows])
    assert seed_row["held-out loss"].startswith("1.500 ± 0.707 (")
    (row,) = rows_by_setting([diverged, *rows], "train.seed")
    assert row == {"method": "lora", "0": "**1.000**", "1": "2.000", "2": "diverged"}
