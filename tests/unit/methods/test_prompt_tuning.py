"""Prompt tuning: initialization of the soft prompt, and keys that contradict each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, Gemma4TextConfig, MptConfig, OPTConfig

from peftbench.errors import UnsupportedModelError
from peftbench.methods.prompt_tuning import PromptTuning
from tests.helpers.architectures import build_tiny_model
from tests.helpers.methods import every_architecture
from tests.helpers.models import embeddings_of
from tests.helpers.training import trainable_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


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


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(
            vocab_size=64,
            word_embed_proj_dim=16,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            ffn_dim=32,
            max_position_embeddings=64,
        ),
        MptConfig(vocab_size=64, d_model=16, n_heads=4, n_layers=1),
    ],
    ids=["embedding narrower than the layers", "heads under another name"],
)
def test_soft_tokens_have_the_width_of_the_embedding(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """OPT-350M's embedding is narrower than its layers: 4 tokens train 4 x 16 numbers, and a step moves them."""
    base = AutoModelForCausalLM.from_config(config)
    method = PromptTuning(num_virtual_tokens=4)
    assert method.trainable_parameters(base) == 4 * 16
    model = method.apply(base, tokenizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [parameter.shape for parameter in trained] == [(4, 16)]
    tokens = torch.arange(12)[None]
    model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss.backward()
    assert trained[0].grad is not None
    assert trained[0].grad.norm() > 0


def test_embedding_is_found_whatever_its_number_of_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    """Moshi's embedding has one row more than its vocabulary."""
    base = build_tiny_model("moshi")
    assert base.get_input_embeddings().weight.shape[0] != base.config.vocab_size  # type: ignore[union-attr,index]
    model = PromptTuning(num_virtual_tokens=4).apply(base, tokenizer)
    tokens = torch.arange(12)[None]
    assert model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.shape[1] == 4 + 12


@pytest.mark.parametrize("per_layer_width", [0, 8])
def test_embeddings_for_each_layer_are_refused(per_layer_width: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gemma 4 with such embeddings needs token ids, which soft tokens lack; without them it is supported."""
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "vocab_size_per_layer_input": len(tokenizer),
        "hidden_size_per_layer_input": per_layer_width,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 8,
        "num_kv_shared_layers": 0,
    }
    base = AutoModelForCausalLM.from_config(Gemma4TextConfig(**values))
    method = PromptTuning(num_virtual_tokens=3)
    if per_layer_width:
        with pytest.raises(UnsupportedModelError, match="gemma4_text looks up embeddings for each layer by token"):
            method.apply(base, tokenizer)
        return
    assert method.apply(base, tokenizer)(input_ids=torch.ones((1, 4), dtype=torch.long)).logits.shape[1] == 7
