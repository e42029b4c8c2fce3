"""A metric that is added with one class and one row of the registry is in every output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from peftbench.evaluation.metrics.base import TextMetric
from peftbench.evaluation.metrics.registry import METRICS
from peftbench.evaluation.outputs import Output
from peftbench.evaluation.scoring import add_scores, fingerprint_examples
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.record import PerExample, Quality, RunRecord, ScoreDefinition, read_record
from peftbench.report.diff.compute import diff_suites
from peftbench.report.diff.metrics import parse_thresholds
from peftbench.report.tables.table import csv_table, markdown_table
from peftbench.report.writer import write_report
from tests.helpers.workshop import Workshop
from tests.unit.report.records import build_costs, build_record


class TokenErrors(TextMetric):
    """Counts wrong tokens, so that lower is better."""

    name: ClassVar[str] = "wrong_tokens"
    scores: Mapping[str, ScoreDefinition] = {
        "wrong_tokens": ScoreDefinition(
            title="wrong tokens",
            description="Tokens that the reference lacks",
            unit="tokens",
            digits=2,
            higher_is_better=False,
            low=0,
        )
    }

    def score_texts(self, generated: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
        pairs = zip(generated, references, strict=True)
        return {"wrong_tokens": tuple(float(len(set(one.split()) - set(other.split()))) for one, other in pairs)}


def score_run(workshop: Workshop, method: Method, wrong: Sequence[int]) -> RunRecord:
    """Return the record of a run whose texts have these numbers of wrong tokens."""
    outputs = [
        Output(id=str(index), reference="a b", generated=" ".join(["a", *(f"x{token}" for token in range(count))]))
        for index, count in enumerate(wrong)
    ]
    recipe = workshop.recipe(method, evaluate={"metrics": ("wrong_tokens",)})
    digest = fingerprint_examples([output.id for output in outputs], [output.reference for output in outputs])
    quality = Quality(split="test", num_examples=len(wrong), per_example=PerExample(examples_fingerprint=digest))
    scored = add_scores(recipe, quality, outputs)
    trainable = 1000 if method.kind == "full" else 10
    return build_record(method.kind, method.kind, trainable, quality=scored, **build_costs(trainable, 1.0, 10))


def test_added_metric_is_in_record_table_summary_page_and_comparison(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the row in the registry names it."""
    monkeypatch.setitem(METRICS, "wrong_tokens", TokenErrors)
    full, lora = (score_run(workshop, Full(), [2, 3] * 20), score_run(workshop, Lora(), [0, 1] * 20))
    paths = {record.write(tmp_path / "A" / record.name): record for record in (full, lora)}
    quality = read_record(next(iter(paths))).quality
    assert quality is not None
    assert (quality.headline_metric, quality.metrics["wrong_tokens"].interval.mean) == ("wrong_tokens", 2.5)
    assert "wrong tokens" in markdown_table([full, lora])
    assert "2.50 (" in markdown_table([full, lora])
    assert '"wrong_tokens","wrong_tokens_low","wrong_tokens_high"' in csv_table([full])
    report = write_report(paths, tmp_path / "report", "A")
    summary = "\n".join(report.summary)
    assert "Compared by wrong tokens (lower is better) with full." in summary
    assert "lora is better than full by 2.00 tokens on seed 0" in summary
    page = report.page_path.read_text(encoding="utf-8")
    assert "wrong tokens (tokens) vs. peak memory (MiB)" in page
    assert "(the wrong tokens axis is inverted)" in page
    assert "All compared pairs, by wrong tokens" in page
    for record in (full, score_run(workshop, Lora(), [1, 1] * 20)):
        record.write(tmp_path / "B" / record.name)
    diff = diff_suites(tmp_path / "A", tmp_path / "B", parse_thresholds(["wrong_tokens=10%"]))
    by_name = {metric.name: metric for run in diff.runs if run.label == "lora" for metric in run.metrics}
    assert by_name["wrong_tokens"].better == "lower"
    assert (by_name["wrong_tokens"].before_text, by_name["wrong_tokens"].after_text) == ("0.500", "1.000")
    assert (by_name["wrong_tokens"].regressed, diff.regressed) == (True, True)
