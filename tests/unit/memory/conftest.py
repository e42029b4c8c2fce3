"""Corpora whose rows all have the same number of labels, as in a simulated step."""

from __future__ import annotations

import pytest

from peftbench.data.sources import Files
from tests.helpers.corpus import write_corpus_with_equal_summaries


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Short examples that are padded to data.max_length, and long ones that are cut to it without padding."""
    return {
        padding: write_corpus_with_equal_summaries(tmp_path_factory.mktemp(padding), times)
        for padding, times in (("max_length", 1), ("free", 12))
    }
