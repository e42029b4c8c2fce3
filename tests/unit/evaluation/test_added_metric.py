"""A metric that is added with one class and one row of the registry is in every output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from peftbench.evaluation.metrics.base import TextMetric
from peftbench.evaluation.metrics.registry import METRICS
from peftbench.evaluation.outputs import Output
from peftbench.evaluation.scoring import add_scores, hash_examples
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


class WordRate(TextMetric):
    """Counts wrong words, so that lower is better."""

    name: ClassVar[str] = "wrong_words"
    scores: Mapping[str, ScoreDefinition] = {
        "wrong_words": ScoreDefinition(
            title="wrong words",
            description="Words that the reference lacks",
            unit="words",
            digits=2,
            higher_is_better=False,
            low=0,
        )
    }

    def score_texts(self, generated: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
        pairs = zip(generated, references, strict=True)
        return {"wrong_words": tuple(float(len(set(one.split()) - set(other.split()))) for one, other in pairs)}


def score_run(workshop: Workshop, method: Method, wrong: Sequence[int]) -> RunRecord:
    """Return the record of a run whose texts have these numbers of wrong words."""
    outputs = [
        Output(id=str(index), reference="a b", generated=" ".join(["a", *(f"x{word}" for word in range(count))]))
        for index, count in enumerate(wrong)
    ]
    recipe = workshop.recipe(method, evaluate={"metrics": ("wrong_words",)})
    digest = hash_examples([output.id for output in outputs], [output.reference for output in outputs])
    quality = Quality(split="test", num_examples=len(wrong), per_example=PerExample(examples_fingerprint=digest))
    scored = add_scores(recipe, quality, outputs)
    trainable = 1000 if method.kind == "full" else 10
    return build_record(method.kind, method.kind, trainable, quality=scored, **build_costs(trainable, 1.0, 10))


def test_added_metric_is_in_record_table_words_page_and_comparison(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the row in the registry names it."""
    monkeypatch.setitem(METRICS, "wrong_words", WordRate)
    full, lora = (score_run(workshop, Full(), [2, 3] * 20), score_run(workshop, Lora(), [0, 1] * 20))
    paths = {record.write(tmp_path / "A" / record.name): record for record in (full, lora)}
    quality = read_record(next(iter(paths))).quality
    assert quality is not None
    assert (quality.headline_metric, quality.metrics["wrong_words"].interval.mean) == ("wrong_words", 2.5)
    assert "wrong words" in markdown_table([full, lora])
    assert "2.50 (" in markdown_table([full, lora])
    assert '"wrong_words","wrong_words_low","wrong_words_high"' in csv_table([full])
    report = write_report(paths, tmp_path / "report", "A")
    words = "\n".join(report.summary)
    assert "Compared by wrong words (lower is better) with full." in words
    assert "lora is better than full by 2.00 words on seed 0" in words
    page = report.page_path.read_text(encoding="utf-8")
    assert "wrong words (words) vs. peak memory (MiB)" in page
    assert "(the wrong words axis is inverted)" in page
    assert "All compared pairs, by wrong words" in page
    for record in (full, score_run(workshop, Lora(), [1, 1] * 20)):
        record.write(tmp_path / "B" / record.name)
    diff = diff_suites(tmp_path / "A", tmp_path / "B", parse_thresholds(["wrong_words=10%"]))
    by_name = {metric.name: metric for run in diff.runs if run.label == "lora" for metric in run.metrics}
    assert by_name["wrong_words"].better == "lower"
    assert (by_name["wrong_words"].before_text, by_name["wrong_words"].after_text) == ("0.500", "1.000")
    assert (by_name["wrong_words"].regressed, diff.regressed) == (True, True)
