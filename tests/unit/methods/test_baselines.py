"""Baselines: rows of the comparison that train nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from peftbench.methods import BASELINES, METHOD_KINDS, METHODS
from peftbench.methods.baselines import Lead, ZeroShot
from peftbench.methods.full import Full
from tests.helpers.batches import logits, micro_batch
from tests.helpers.training import trainable_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def test_kinds_of_methods_and_baselines_are_distinct() -> None:
    """The default of each class's kind is its key in the registry, and METHOD_KINDS has both registries."""
    assert METHODS
    assert BASELINES
    assert not set(METHODS) & set(BASELINES)
    assert set(METHOD_KINDS) == set(METHODS) | set(BASELINES)
    assert all(part.model_fields["kind"].default == kind for kind, part in METHOD_KINDS.items())


def test_only_methods_train() -> None:
    """Methods are trainable, baselines are not."""
    assert all(method.is_trainable for method in METHODS.values())
    assert not any(baseline.is_trainable for baseline in BASELINES.values())


def test_zero_shot_logits_equal_those_of_the_base(
    fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """No parameter requires a gradient."""
    model = ZeroShot().apply(fresh_base("gpt2_tied"), tokenizer).eval()
    assert not trainable_parameters(model)
    with torch.no_grad():
        assert torch.equal(logits(model, micro_batch()), logits(fresh_base("gpt2_tied").eval(), micro_batch()))


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [(1, "It rained."), (2, "It rained. The river rose."), (9, "It rained. The river rose. No bridge held.")],
)
def test_lead_extracts_the_first_sentences(sentences: int, expected: str) -> None:
    """A shorter prompt is extracted as a whole."""
    assert Lead(sentences=sentences).extract_output("It rained. The river rose.\nNo bridge held.") == expected


def test_only_lead_extracts_an_output() -> None:
    """Methods that generate text with a model return None."""
    assert Full().extract_output("It rained.") is None
    assert ZeroShot().extract_output("It rained.") is None


def test_lead_cannot_be_applied_to_a_model(
    fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The error states that Lead trains nothing."""
    with pytest.raises(TypeError, match="Lead trains nothing"):
        Lead().apply(fresh_base("gpt2_tied"), tokenizer)
