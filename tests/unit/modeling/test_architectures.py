"""Over many architectures: a base goes without masks only where each document gives what it gives alone.

Bases are tiny, with random weights. What they are held to is transformers' own attention over each document by itself.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from peftbench.data.collate import Collator, PaddingFreeCollator
from peftbench.modeling.loss import CausalLMLoss, build_loss
from tests.helpers.batches import rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftbench.data.collate import MicroBatch

VOCABULARY, HIDDEN, LAYERS, HEADS, HEAD = 64, 32, 2, 4, 8
SHORT = 16
"""Positions that some variants were trained on: fewer than the longest document has."""
DOCUMENTS = ((14, 3), (20, 5), (9, 1), (1, 1), (20, 19))
"""Tokens of each, and how many of them are prompt; one has no label, and one a single one."""
ALLOWED = 1e-4
"""How far losses and logits may be apart, relatively; the worst was 4e-6, and the nearest of what is refused 0.05."""

PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER: dict[str, Any] = PLAIN | {"is_decoder": True}
HALF: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "max_position_embeddings": 64,
    "encoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_layers": LAYERS,
    "decoder_attention_heads": HEADS,
    "decoder_ffn_dim": HIDDEN,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""The decoder of an encoder and a decoder, by itself."""
OLD: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WITH_WIDTH = PLAIN | {"head_dim": HEAD}
EXPERTS = PLAIN | {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "kv_channels": HEAD,
}
WINDOW = {"sliding_window": 8}
CHUNKS = {"attention_chunk_size": 8}
LATENT = EXPERTS | {
    "num_key_value_heads": HEADS,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA = {
    "mamba_d_ssm": HIDDEN,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
BY_LENGTH = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * (HEAD // 2),
    "long_factor": [4.0] * (HEAD // 2),
    "original_max_position_embeddings": SHORT,
}

CASES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "apertus",
            "arcee",
            "biogpt",
            "bitnet",
            "cohere",
            "cwm",
            "diffllama",
            "doge",
            "ernie4_5",
            "falcon",
            "gemma2",
            "gemma3_text",
            "gpt_neox",
            "gpt_neox_japanese",
            "granite",
            "granite_swa",
            "hrm_text",
            "hyperclovax",
            "internlm3",
            "iquestcoder",
            "jais2",
            "lfm2",
            "llama",
            "mistral",
            "modernbert-decoder",
            "moshi",
            "nanochat",
            "nemotron",
            "olmo",
            "olmo2",
            "persimmon",
            "phi",
            "phi3",
            "qwen2",
            "recurrent_gemma",
            "smollm3",
            "stablelm",
            "starcoder2",
            "vaultgemma",
        ),
        PLAIN,
    ),
    **dict.fromkeys(
        ("gemma", "glm", "glm4", "helium", "hunyuan_v1_dense", "ministral3", "qwen3", "seed_oss"), WITH_WIDTH
    ),
    **dict.fromkeys(
        (
            "aria_text",
            "flex_olmo",
            "glm4_moe",
            "granitemoe",
            "granitemoeshared",
            "hy_v3",
            "jetmoe",
            "laguna",
            "mellum",
            "minimax",
            "minimax_m2",
            "minimax_m3_vl_text",
            "mixtral",
            "olmoe",
            "phimoe",
            "qwen2_moe",
            "qwen3_moe",
            "solar_open",
        ),
        EXPERTS,
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        ),
        ENCODER,
    ),
    **dict.fromkeys(
        ("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "trocr", "whisper"),
        HALF,
    ),
    **dict.fromkeys(("gpt2", "gpt-sw3", "gpt_bigcode", "openai-gpt"), OLD),
    **dict.fromkeys(("codegen", "gptj"), OLD | {"rotary_dim": 4}),
    "bloom": PLAIN | {"n_layer": LAYERS, "n_head": HEADS},
    "ctrl": OLD | {"dff": HIDDEN},
    "cohere2": PLAIN | WINDOW,
    "exaone4": PLAIN | WINDOW,
    "falcon_h1": WITH_WIDTH | MAMBA,
    "lfm2, convolutions": PLAIN | {"layer_types": ["conv", "full_attention"]},
    "llama, rotation by length": PLAIN | {"max_position_embeddings": SHORT, "rope_parameters": BY_LENGTH},
    "llama4_text": EXPERTS | {"head_dim": HEAD, "intermediate_size_mlp": 48},
    "llama4_text, chunks": EXPERTS | {"head_dim": HEAD, "intermediate_size_mlp": 48} | CHUNKS,
    "minimax_m3_vl_text, sparse": EXPERTS
    | {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_block_size": 4, "index_topk_blocks": 1},
    "ministral": WITH_WIDTH | WINDOW,
    "mistral, window": PLAIN | WINDOW,
    "mpt": {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS},
    "olmo3": PLAIN | WINDOW,
    "opt": PLAIN | {"ffn_dim": HIDDEN, "word_embed_proj_dim": HIDDEN},
    "phi3, long": PLAIN | {"original_max_position_embeddings": SHORT, "rope_parameters": LONG},
    "phi3, window": PLAIN | WINDOW,
    "qwen2, window": PLAIN | WINDOW | {"use_sliding_window": True, "max_window_layers": 0},
    "starcoder2, window": PLAIN | WINDOW,
    "xglm": PLAIN | {"d_model": HIDDEN, "num_layers": LAYERS, "attention_heads": HEADS, "ffn_dim": HIDDEN},
}
"""Configs by model type, and by what varies it."""

GOOD = ("cohere", "gpt2", "gpt_neox", "granite", "llama", "olmo2", "opt", "phi", "qwen2", "qwen3")
"""What must go without masks."""
LENGTHS_MATTER = ("llama, rotation by length", "phi3, long")
"""Where a position is embedded by how long a whole row is: padding changes them too, whoever attends."""
MIXING = (
    *LENGTHS_MATTER,
    "bart",
    "blenderbot",
    "blenderbot-small",
    "camembert",
    "data2vec-text",
    "falcon_h1",
    "lfm2, convolutions",
    "llama4_text, chunks",
    "marian",
    "mbart",
    "pegasus",
    "plbart",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
)
"""What mixes documents that share a row where it is given no mask: positions of its own, state or chunks of the row."""


def encoded() -> list[list[int]]:
    """Random tokens of each document."""
    return [[1 + token % (VOCABULARY - 1) for token in row["input_ids"]] for row in rows(DOCUMENTS)]


@functools.cache
def plain_base(case: str) -> PreTrainedModel:
    """A base that nothing of this project has touched, with weights wide enough that all of it matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(case.split(",", maxsplit=1)[0], **CASES[case])
    torch.manual_seed(0)
    base: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return base


@functools.cache
def alone(case: str) -> torch.Tensor:
    """Logits that predict the labels, each document by itself as transformers computes it: (labels, vocabulary)."""
    found = []
    for tokens, (_, prompt) in zip(encoded(), DOCUMENTS, strict=True):
        base = copy.deepcopy(plain_base(case))  # some remember how long a row they have seen
        with torch.no_grad():
            found.append(base(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, prompt - 1 : -1])
    return torch.cat(found)


@functools.cache
def made(case: str) -> tuple[CausalLMLoss, tuple[str, ...]]:
    """The loss of a copy of that base, and its notes."""
    return build_loss(copy.deepcopy(plain_base(case)))


def batch_of(collator: Collator) -> MicroBatch:
    """The documents, as ``collator`` lays them out."""
    return collator.collate(encoded(), [prompt for _, prompt in DOCUMENTS])


def assert_as_alone(case: str, collator: Collator) -> None:
    """Logits at every label, and the loss."""
    (loss, _), expected, batch = made(case), alone(case), batch_of(collator)
    with torch.no_grad(), loss.attention_context():
        logits, summed = loss.logits(loss.base, batch), loss(loss.base, batch)
        by_token = loss.per_token(loss.base, batch)
    apart = float((logits - expected).abs().max() / expected.abs().max())
    assert apart <= ALLOWED, f"logits of {case} are {apart:.1e} apart under {type(collator).__name__}"
    each = cross_entropy(expected, batch.targets, reduction="none")
    assert summed.item() == pytest.approx(each.sum().item(), rel=ALLOWED)
    assert float((by_token - each).abs().max() / each.max()) <= ALLOWED


def test_there_are_cases() -> None:
    """The sweep is not empty, nor is what it says of either kind."""
    masked = {case for case in CASES if made(case)[0].uses_masks}
    assert len({case.split(",")[0] for case in CASES}) >= 80
    assert len(masked) >= 30
    assert len(CASES) - len(masked) >= 30


@pytest.mark.parametrize("case", CASES)
def test_documents_give_what_each_gives_alone(case: str) -> None:
    """Packed into one row, or else it is told why they cannot be; and in padded rows."""
    loss, notes = made(case)
    assert loss.uses_masks == (loss.mask_reason is not None)
    if loss.uses_masks:
        assert loss.mask_reason
        assert any(loss.mask_reason in note for note in notes)
    else:
        assert_as_alone(case, PaddingFreeCollator(0))
    if case not in LENGTHS_MATTER:
        assert_as_alone(case, Collator(0))


@pytest.mark.parametrize("case", GOOD)
def test_what_must_go_without_masks(case: str) -> None:
    """A check that refused everything would be no check."""
    assert made(case)[0].mask_reason is None


@pytest.mark.parametrize("case", MIXING)
def test_what_mixes_documents_is_refused(case: str) -> None:
    """With the reason, and its attention is left as it was."""
    loss, _ = made(case)
    assert loss.mask_reason
    assert loss.uses_masks
    with loss.attention_context():
        assert loss.base.config._attn_implementation == plain_base(case).config._attn_implementation


@pytest.mark.parametrize("case", MIXING)
def test_what_is_refused_does_mix_them(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it not refused, the comparison above would fail: it can tell."""
    monkeypatch.setattr("peftbench.modeling.loss.find_mask_free_blocker", lambda _: None)
    made.cache_clear()
    try:
        assert not made(case)[0].uses_masks
        with pytest.raises((AssertionError, TypeError)):
            assert_as_alone(case, PaddingFreeCollator(0))
    finally:
        made.cache_clear()
