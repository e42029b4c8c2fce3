"""Prompt tuning: initialization of the soft prompt, and keys that contradict each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError

from peftbench.methods.prompt_tuning import PromptTuning
from tests.helpers.methods import every_architecture
from tests.helpers.models import embeddings_of
from tests.helpers.training import trainable_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def _build_soft_prompt(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, **keys: Any
) -> torch.Tensor:
    torch.manual_seed(seed)
    (soft_prompt,) = trainable_parameters(PromptTuning(**keys).apply(base, tokenizer)).values()
    return soft_prompt.detach().clone()


@every_architecture
def test_text_initialization_repeats_the_embeddings_of_the_text(
    architecture: str, fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The soft prompt has the embeddings of the text's tokens, repeated up to num_virtual_tokens."""
    text = "the village council"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    count = len(ids) + 2
    expected = embeddings_of(fresh_base(architecture))[torch.tensor((ids * count)[:count])]
    soft_prompt = _build_soft_prompt(
        fresh_base(architecture),
        tokenizer,
        0,
        num_virtual_tokens=count,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=text,
    )
    assert torch.equal(soft_prompt, expected)


@every_architecture
def test_vocabulary_initialization_uses_token_embeddings(
    architecture: str, fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Each virtual token starts as the embedding of a token of the vocabulary."""
    embeddings = embeddings_of(fresh_base(architecture))
    soft_prompt = _build_soft_prompt(
        fresh_base(architecture), tokenizer, 0, num_virtual_tokens=6, prompt_tuning_init="SAMPLE_VOCAB"
    )
    assert all((embeddings == token).all(dim=1).any() for token in soft_prompt)


@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB"])
def test_initialization_depends_only_on_the_seed(
    init: str, fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The same seed gives the same soft prompt, and a different seed a different one."""
    first, again, other = (
        _build_soft_prompt(fresh_base("gpt2_tied"), tokenizer, seed, num_virtual_tokens=6, prompt_tuning_init=init)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "keys",
    [
        {"prompt_tuning_init": "TEXT"},
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": ""},
        {"prompt_tuning_init_text": "a text"},
        {"num_virtual_tokens": 0},
    ],
)
def test_contradictory_keys_are_refused(keys: dict[str, Any]) -> None:
    """A text without TEXT initialization, TEXT initialization without a text, and zero virtual tokens."""
    with pytest.raises(ValidationError):
        PromptTuning(**keys)
