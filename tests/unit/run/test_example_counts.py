"""Examples shared by splits, cut or dropped are counted in the record and shown in its notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftbench.data.sources import Files
from peftbench.methods.baselines import ZeroShot
from peftbench.methods.lora import Lora
from peftbench.record import RunRecord, SplitOverlap
from peftbench.report.tables.table import collect_notes
from tests.helpers.corpus import examples, write_corpus
from tests.helpers.workshop import Workshop

TRAIN = examples(8, seed=1)
OTHER = examples(8, seed=2)
SPACED = {**TRAIN[1], "article": f" {TRAIN[1]['article']}\n"}
SAME_IDS = [{**row, "id": known["id"]} for row, known in zip(OTHER, TRAIN, strict=True)]
NONE = SplitOverlap(texts=0, texts_with_reference=0)


def run_on(workshop: Workshop, folder: Path, test: list[dict[str, Any]], **source_keys: Any) -> RunRecord:
    """Train on ``TRAIN``, evaluate on ``test``, and return the record."""
    folder.mkdir()
    source = write_corpus(folder, {"train": TRAIN, "validation": OTHER, "test": test})
    source = source.model_copy(update=source_keys)
    return workshop.run(workshop.recipe(Lora(r=2), data={"source": source}, train={"steps": 1}))


def with_ids(rows: list[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """Return the rows with ids of their own."""
    return [{**row, "id": f"{prefix}{index}"} for index, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        (with_ids(OTHER, "new"), NONE),
        (with_ids([*OTHER[:5], *TRAIN[:3]], "new"), SplitOverlap(texts=3, texts_with_reference=3)),
        (
            with_ids(
                [*OTHER[:6], {**TRAIN[0], "summary": "Another."}, {**TRAIN[1], "article": f" {TRAIN[1]['article']}\n"}],
                "new",
            ),
            SplitOverlap(texts=2, texts_with_reference=1),
        ),
        (
            [{**row, "id": TRAIN[index]["id"]} for index, row in enumerate(OTHER)],
            SplitOverlap(texts=0, texts_with_reference=0, ids=8),
        ),
        (TRAIN, SplitOverlap(texts=8, texts_with_reference=8, ids=8, same_file=True)),
        (list(reversed(TRAIN)), SplitOverlap(texts=8, texts_with_reference=8, ids=8)),
    ],
    ids=["none", "texts", "other summary", "ids", "same file", "reordered"],
)
def test_overlap_of_splits_is_counted(
    test: list[dict[str, Any]], expected: SplitOverlap, workshop: Workshop, tmp_path: Path
) -> None:
    """Texts, texts with their summaries, ids and files are compared; any overlap is the first note."""
    record = run_on(workshop, tmp_path / "data", test)
    assert record.split_overlap == expected
    notes = collect_notes([record])
    if expected == NONE:
        assert not any("train" in note and "test" in note for note in notes)
    else:
        assert "train" in notes[0]
        assert "test" in notes[0]


def test_row_numbers_are_not_compared(workshop: Workshop, tmp_path: Path) -> None:
    """Without a column of ids, equal row numbers of two files do not count."""
    assert run_on(workshop, tmp_path / "data", OTHER, id=None).split_overlap == SplitOverlap(
        texts=0, texts_with_reference=0
    )


def test_baseline_has_no_overlap(workshop: Workshop) -> None:
    """It trains nothing."""
    assert workshop.run(workshop.recipe(ZeroShot())).split_overlap is None


def test_cut_and_dropped_examples_are_noted(workshop: Workshop, tmp_path: Path) -> None:
    """The notes name the split, the numbers and the limit."""
    rows = [*TRAIN[:4], {**TRAIN[4], "article": "town " * 200}, {**TRAIN[5], "summary": "town " * 60}]
    (tmp_path / "data").mkdir()
    source: Files = write_corpus(tmp_path / "data", {"train": rows, "validation": OTHER, "test": OTHER})
    data = {"source": source, "overlong": "drop"}
    record = workshop.run(workshop.recipe(Lora(r=2), data=data, train={"steps": 1, "global_batch_size": 4}))
    assert record.num_examples["train"] == 5
    assert record.num_dropped_examples["train"] == 1
    assert record.num_cut_examples["train"] >= 1
    notes = collect_notes([record])
    assert "run: 1 of 6 train examples are dropped: they do not fit data.max_length=48" in notes
    assert f"run: {record.num_cut_examples['train']} of 5 train texts are cut to fit data.max_length=48" in notes
