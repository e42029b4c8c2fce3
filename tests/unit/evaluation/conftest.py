"""Fixtures for evaluation: small models and a few examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from peftbench.data.encode import Encoder, SequenceLayout
from peftbench.evaluation.evaluator import Evaluator
from peftbench.methods.base import Method
from peftbench.tasks.summarization import Summarization
from tests.helpers.corpus import examples
from tests.helpers.evaluators import MAX_TOKENS, NEW_TOKENS, ApplyMethod, BuildEvaluator
from tests.helpers.models import POSITIONS
from tests.helpers.training import single_process_context, wrap_model
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@pytest.fixture
def apply_method(fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> ApplyMethod:
    """Return a function that applies a method to a new copy of an architecture's base model."""

    def apply(method: Method, architecture: str) -> nn.Module:
        torch.manual_seed(3)
        return method.apply(fresh_base(architecture), tokenizer)

    return apply


@pytest.fixture(scope="session")
def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Return an encoder for models with ``POSITIONS`` positions, with room for a few virtual tokens."""
    layout = SequenceLayout.for_model(
        max_length=MAX_TOKENS, max_new_tokens=NEW_TOKENS, max_positions=POSITIONS, virtual_tokens=8
    )
    return Encoder(tokenizer, layout, Summarization(separator=" TL;DR:"))


@pytest.fixture(scope="session")
def encoded(encoder: Encoder) -> Dataset:
    """Return seven encoded examples that are not sorted by length."""
    dataset, dropped = encoder.encode_split(Dataset.from_list(examples(7, seed=4)), "test", "refuse")
    assert dropped == 0
    lengths = [len(ids) for ids in dataset["input_ids"]]
    assert lengths != sorted(lengths)
    return dataset


@pytest.fixture
def build_evaluator(accelerator: Accelerator, encoder: Encoder, encoded: Dataset, workshop: Workshop) -> BuildEvaluator:
    """Return a function that builds an evaluator of a method's model; keyword arguments set keys of ``evaluate``."""

    def build(method: Method, model: nn.Module, dataset: Dataset = encoded, **keys: Any) -> Evaluator:
        recipe = workshop.recipe(method, evaluate={"metrics": None, "max_new_tokens": NEW_TOKENS, **keys})
        return Evaluator(single_process_context(accelerator), wrap_model(model), encoder, dataset, recipe)

    return build
