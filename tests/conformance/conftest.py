"""The battery's workbench."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.conformance.battery import Bench, Case, MakeBench, bench_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@pytest.fixture
def make_bench(fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> MakeBench:
    """Applies a case's method to a new copy of its base."""

    def made(case: Case) -> Bench:
        return bench_of(case, fresh_base(case.architecture), tokenizer)

    return made
