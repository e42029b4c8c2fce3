"""Corpora whose rows all have the same number of labels, as in a simulated step."""

from __future__ import annotations

import pytest

from peftbench.data.sources import Files
from tests.helpers.corpus import examples, write_corpus


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Short examples that are padded to data.max_length, and long ones that are cut to it without padding."""
    corpora = {}
    for padding, times in (("max_length", 1), ("free", 12)):
        train = [
            example | {"article": " ".join([example["article"]] * times), "summary": "harbour council vote"}
            for example in examples(24, seed=1)
        ]
        splits = {"train": train, "validation": train[:4], "test": train[:4]}
        corpora[padding] = write_corpus(tmp_path_factory.mktemp(padding), splits)
    return corpora
