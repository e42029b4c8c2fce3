"""The command that is predicted to fit, after an out-of-memory error."""

from __future__ import annotations

import pytest

from peftbench.record import Outcome
from peftbench.report.analysis.outcomes import oom_sentence
from peftbench.report.reproduce import build_fitting_command
from tests.unit.report.records import build_record


@pytest.mark.parametrize(
    ("overrides", "changes", "command"),
    [
        ((), {}, None),
        (("train.micro_batch_size=1",), {}, "peftbench train runs/a/record.json train.micro_batch_size=1"),
        (("evaluate.num_beams=1",), {}, "peftbench evaluate runs/a evaluate.num_beams=1"),
        (("evaluate.batch_size=1", "optimizer.kind=adamw8bit"), {}, "peftbench train runs/a/record.json"),
        (("evaluate.num_beams=1",), {"tokens": None}, "peftbench train runs/a/record.json evaluate.num_beams=1"),
    ],
)
def test_command_changes_only_what_must_change(
    overrides: tuple[str, ...], changes: dict[str, object], command: str | None
) -> None:
    """A trained model is evaluated again; a baseline, which saves none, is run again."""
    outcome = Outcome(kind="oom", suggestion="with x the run is predicted to fit", suggested_overrides=overrides)
    record = build_record("a", "full", 1, outcome=outcome, **changes)
    built = build_fitting_command(record)
    assert built is None if command is None else str(built).startswith(command)
    if built is not None:
        assert oom_sentence(record).endswith(f": {built}")


def test_model_that_is_not_saved_is_trained_again() -> None:
    """There is nothing to evaluate."""
    outcome = Outcome(kind="oom", suggested_overrides=("evaluate.num_beams=1",))
    record = build_record("a", "full", 1, outcome=outcome)
    record = record.model_copy(update={"recipe": record.recipe | {"save_model": False}})
    assert str(build_fitting_command(record)).startswith("peftbench train runs/a/record.json")


def test_names_are_quoted_for_a_shell() -> None:
    """A run's folder may have any characters."""
    outcome = Outcome(kind="oom", suggested_overrides=("train.micro_batch_size=1",))
    record = build_record("a", "full", 1, outcome=outcome)
    record = record.model_copy(update={"recipe": record.recipe | {"output_dir": "my runs; rm"}})
    assert "'my runs; rm/a/record.json'" in str(build_fitting_command(record))
