"""Evaluations of small models on a handful of examples."""

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
from tests.helpers.corpus import examples
from tests.helpers.models import POSITIONS
from tests.helpers.training import alone, built_around
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 10
MAX_TOKENS = 48

MakeEvaluation = Callable[..., Evaluator]
Applied = Callable[[Method, str], nn.Module]


@pytest.fixture
def applied(fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> Applied:
    """Given a method and the name of an architecture, the method applied to a new copy of its base."""

    def made(method: Method, architecture: str) -> nn.Module:
        torch.manual_seed(3)
        return method.apply(fresh_base(architecture), tokenizer)

    return made


@pytest.fixture(scope="session")
def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Encodes for bases with ``POSITIONS`` positions, with room for a few virtual tokens."""
    layout = SequenceLayout.for_model(
        separator=" TL;DR:", max_length=MAX_TOKENS, max_new_tokens=NEW_TOKENS, max_positions=POSITIONS, virtual_tokens=8
    )
    return Encoder(tokenizer, layout)


@pytest.fixture(scope="session")
def encoded(encoder: Encoder) -> Dataset:
    """Seven encoded examples, in no order of length."""
    dataset, dropped = encoder.encode_split(Dataset.from_list(examples(7, seed=4)), "test", "refuse")
    assert dropped == 0
    lengths = [len(ids) for ids in dataset["input_ids"]]
    assert lengths != sorted(lengths)
    return dataset


@pytest.fixture
def evaluation(accelerator: Accelerator, encoder: Encoder, encoded: Dataset, workshop: Workshop) -> MakeEvaluation:
    """Given a method and the model it made, their evaluation; what is given by name replaces single knobs."""

    def made(method: Method, model: nn.Module, dataset: Dataset = encoded, **knobs: Any) -> Evaluator:
        recipe = workshop.recipe(method, evaluate={"generate": True, "max_new_tokens": NEW_TOKENS, **knobs})
        return Evaluator(alone(accelerator), built_around(model), encoder, dataset, recipe)

    return made
