"""Examples whose rows have all as many labels, as those of a rehearsal have."""

from __future__ import annotations

import pytest

from peftbench.data.sources import Files
from peftbench.record import RunRecord
from tests.helpers.corpus import examples, write_corpus


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Short ones that are padded to max_tokens, and long ones that are cut to them, so that none has padding."""
    made = {}
    for padding, times in (("max_length", 1), ("free", 12)):
        written = [
            example | {"article": " ".join([example["article"]] * times), "summary": "harbour council vote"}
            for example in examples(24, seed=1)
        ]
        splits = {"train": written, "validation": written[:4], "test": written[:4]}
        made[padding] = write_corpus(tmp_path_factory.mktemp(padding), splits)
    return made


def labels_a_row(record: RunRecord, global_batch: int) -> int:
    """Labelled tokens of each example, which are alike."""
    assert record.tokens is not None
    labels, left = divmod(record.tokens.labelled, global_batch * record.steps)
    assert left == 0 < labels
    return labels
