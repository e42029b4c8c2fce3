"""Fixtures of the conformance tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.conformance.battery import Bench, Case, MakeBench, bench_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@pytest.fixture
def make_bench(fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> MakeBench:
    """Return a function that applies a case's method to a new copy of its base model."""

    def build_bench(case: Case) -> Bench:
        return bench_of(case, fresh_base(case.architecture), tokenizer)

    return build_bench
