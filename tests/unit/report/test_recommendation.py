"""The recommendation claims what the intervals support, and names what it applies to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftbench.record import RunRecord, read_records
from peftbench.report.analysis.significance import compare_groups
from peftbench.report.recommendation import describe_context, recommend
from tests.helpers.paths import REPOSITORY
from tests.unit.report.records import build_costs, build_judged_record, draw_scores

COUNT = 100
BASE = draw_scores(COUNT, 0, spread=10)


def build_run(name: str, kind: str, shift: float, costs: tuple[int, float, int], **changes: Any) -> RunRecord:
    """Build a run whose mean ROUGE-L differs from that of full fine-tuning by ``shift``."""
    noisy = draw_scores(COUNT, sum(map(ord, name)), 3.0)
    mean = sum(noisy) / COUNT
    values = [base + shift + value - mean for base, value in zip(BASE, noisy, strict=True)] if shift else BASE
    return build_judged_record(name, kind, values, **(build_costs(*costs) | changes))


def recommendation(*records: RunRecord) -> list[str]:
    """Return the sentences of the recommendation for some runs."""
    return recommend(compare_groups(records))


FULL = build_run("full", "full", 0.0, (1000, 1.0, 100))


def test_cheaper_method_within_the_interval_is_recommended() -> None:
    """Its distance from full fine-tuning and its costs are named, and what is worse."""
    lora = build_run("lora", "lora", 0.1, (380, 0.82, 69))
    prompt = build_run("prompt_tuning", "prompt_tuning", -6.0, (300, 0.8, 60))
    choice, reason, worse = recommendation(FULL, lora, prompt)
    assert choice == "Use lora."
    assert reason.startswith("It is within ")
    costs = "at 38 % of its memory, 82 % of its time (single runs) and 69 % of its model FLOPs."
    assert reason.endswith(f" ROUGE-L of full on seed 0, {costs}")
    assert worse == "prompt_tuning is significantly worse on seed 0."


def test_other_candidate_is_named_with_its_higher_cost() -> None:
    """A configuration that is not worse and needs more is an alternative that the reader must know."""
    lora = build_run("lora", "lora", 0.1, (380, 0.82, 69))
    prompt = build_run("prompt_tuning", "prompt_tuning", 0.2, (300, 0.8, 60))
    sentences = recommendation(FULL, lora, prompt)
    assert sentences[0] == "Use prompt_tuning."
    assert "lora is not significantly worse on seed 0 and needs more memory." in sentences


def test_better_method_is_recommended_whatever_it_costs() -> None:
    """A significantly worse method is not a candidate."""
    lora = build_run("lora", "lora", -5.0, (380, 0.82, 69))
    expected = ["Use full.", "It is significantly better on seed 0 than every other trained configuration."]
    assert recommendation(FULL, lora) == expected
    better = build_run("lora", "lora", 5.0, (2000, 1.5, 150))
    assert recommendation(FULL, better)[0] == "Use lora."


def test_dearer_method_within_the_interval_is_not_recommended() -> None:
    """The reference is the cheapest of those that are not worse."""
    lora = build_run("lora", "lora", 0.1, (2000, 1.5, 150))
    expected = ["Use full.", "lora is not significantly worse on seed 0 and needs more memory."]
    assert recommendation(FULL, lora) == expected


@pytest.mark.parametrize(("shift", "is_beaten"), [(0.1, False), (9.0, False), (-9.0, True)])
def test_baseline_that_no_training_beats_is_named(shift: float, is_beaten: bool) -> None:
    """Fine-tuning that does not help is not praised."""
    baseline = build_run("lead_1", "lead", shift, (0, 0.0, 0), tokens=None, parameters=None)
    sentences = recommendation(FULL, baseline)
    last = "No trained configuration is significantly better on seed 0 than lead_1, which trains nothing."
    assert (last in sentences) != is_beaten
    assert sentences[0] == ("Use full." if is_beaten else "If you train, use full.")


def test_too_few_examples_give_no_recommendation() -> None:
    """The number that is needed is named."""
    runs = [build_judged_record(name, name, BASE[:10], **build_costs(1000, 1.0, 100)) for name in ("full", "lora")]
    assert recommendation(*runs) == [
        "No recommendation: 10 held-out examples are too few to compare quality (at least 20 are needed)."
    ]


def test_single_configuration_gives_no_recommendation() -> None:
    """Nothing is compared."""
    assert recommendation(FULL) == []
    assert recommendation(FULL, FULL.model_copy(update={"name": "full again"})) == []


@pytest.mark.parametrize("folder", ["demo", "demo_seeds", "demo_budget", "demo_rates"])
def test_recommendation_of_committed_records_is_supported(folder: str) -> None:
    """No trained configuration is significantly better than the recommended one."""
    comparison_set = compare_groups(read_records(REPOSITORY / "docs" / "results" / folder))
    first, *_ = recommend(comparison_set)
    if first.startswith("No recommendation"):
        assert comparison_set.num_examples < 20
        return
    label = first.rstrip(".").rpartition("se ")[2]
    (choice,) = [group for group in comparison_set.groups if group.label == label]
    for pair in comparison_set.pair_comparisons:
        if choice in (pair.first, pair.second) and pair.better_group not in (None, choice):
            assert not pair.better_group.is_trained  # type: ignore[union-attr]


def test_context_names_model_data_device_budget_and_dates() -> None:
    """Paths of a machine are reduced to their names; several values are joined."""
    recipe = FULL.recipe | {
        "model": {"path": "/home/me/models/gpt2"},
        "data": FULL.recipe["data"] | {"source": {"kind": "files", "train": "/home/me/rows.jsonl"}},
        "budget": {"memory": "16GiB"},
    }
    changes = {
        "recipe": recipe,
        "num_examples": {"test": 100, "train": 4000},
        "started_at": "2026-01-03T00:00:00+00:00",
    }
    run = FULL.model_copy(update=changes)
    other = run.model_copy(update={"started_at": "2026-01-05T00:00:00+00:00"})
    assert describe_context([run, other]) == (
        "Base model: gpt2; rows.jsonl, 4,000 train and 100 test examples; a GPU; memory budget 16GiB; "
        "2026-01-03 to 2026-01-05"
    )
    hub = run.model_copy(
        update={"recipe": recipe | {"model": {"path": "openai-community/gpt2"}, "budget": {"memory": None}}}
    )
    assert describe_context([hub]).startswith("Base model: openai-community/gpt2; ")
    assert "no memory budget" in describe_context([hub])


def test_report_starts_with_the_recommendation(tmp_path: Path) -> None:
    """The page, RESULTS.md and the terminal's summary have the same sentences."""
    from peftbench.report.writer import write_report
    from tests.unit.report.page.pages import load_shipped_records

    records = load_shipped_records("demo")
    written = write_report(records, tmp_path, "demo")
    sentences = recommend(compare_groups(list(records.values())))
    assert written.summary[0] == " ".join(sentences)
    assert written.summary[1] == f"{describe_context(list(records.values()))}."
    page = written.page_path.read_text(encoding="utf-8")
    assert page.index('class="recommendation"') < page.index('id="summary-title"')
    assert f"<strong>{sentences[0]}</strong>" in page
    assert " ".join(sentences)[:60] in (tmp_path / "RESULTS.md").read_text(encoding="utf-8").replace("\\", "")
