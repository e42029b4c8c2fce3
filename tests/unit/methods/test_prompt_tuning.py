"""Prompt tuning: where it starts, and what its knobs must say together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError

from peftbench.methods.prompt_tuning import PromptTuning
from tests.helpers.methods import every_architecture
from tests.helpers.models import embeddings_of
from tests.helpers.training import trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def _soft_tokens(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, **knobs: Any) -> torch.Tensor:
    torch.manual_seed(seed)
    (only,) = trained(PromptTuning(**knobs).apply(base, tokenizer)).values()
    return only.detach().clone()


@every_architecture
def test_starts_from_the_text(
    architecture: str, fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """With init: text the soft tokens are the embeddings of that text's tokens, repeated to their number."""
    text = "the village council"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    count = len(ids) + 2
    expected = embeddings_of(fresh_base(architecture))[torch.tensor((ids * count)[:count])]
    found = _soft_tokens(
        fresh_base(architecture),
        tokenizer,
        0,
        num_virtual_tokens=count,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=text,
    )
    assert torch.equal(found, expected)


@every_architecture
def test_starts_from_the_vocabulary(
    architecture: str, fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """With init: vocabulary each soft token is the embedding of some token of the vocabulary."""
    embeddings = embeddings_of(fresh_base(architecture))
    found = _soft_tokens(
        fresh_base(architecture), tokenizer, 0, num_virtual_tokens=6, prompt_tuning_init="SAMPLE_VOCAB"
    )
    assert all((embeddings == token).all(dim=1).any() for token in found)


@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB"])
def test_start_depends_on_the_seed_alone(
    init: str, fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The same seed starts from the same soft tokens, another seed from others."""
    first, again, other = (
        _soft_tokens(fresh_base("gpt2_tied"), tokenizer, seed, num_virtual_tokens=6, prompt_tuning_init=init)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "knobs",
    [
        {"prompt_tuning_init": "TEXT"},
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": ""},
        {"prompt_tuning_init_text": "a text"},
        {"num_virtual_tokens": 0},
    ],
)
def test_knobs_that_contradict_each_other(knobs: dict[str, Any]) -> None:
    """A text without init: text, init: text without one, and no token at all are refused."""
    with pytest.raises(ValidationError):
        PromptTuning(**knobs)
