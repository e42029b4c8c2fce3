"""Mask-free attention on many architectures: used only if it computes the same logits as separate documents.

Models are tiny, with random weights. The reference is transformers' own attention, one document per forward pass.
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
"""Maximum positions of some variants: fewer than the tokens of the longest document."""
DOCUMENTS = ((14, 3), (20, 5), (9, 1), (1, 1), (20, 19))
"""Tokens and prompt tokens of each document; one document has no label, and one has a single label."""
TOLERANCE = 1e-4
"""Maximum relative difference of losses and logits. Largest measured: 4e-6; smallest of a refused model: 0.05."""

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
DECODER: dict[str, Any] = {
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
"""The decoder of an encoder-decoder model, used by itself."""
GPT2_KEYS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WITH_HEAD_DIM = PLAIN | {"head_dim": HEAD}
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
DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONGROPE = {
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
        ("gemma", "glm", "glm4", "helium", "hunyuan_v1_dense", "ministral3", "qwen3", "seed_oss"), WITH_HEAD_DIM
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
        DECODER,
    ),
    **dict.fromkeys(("gpt2", "gpt-sw3", "gpt_bigcode", "openai-gpt"), GPT2_KEYS),
    **dict.fromkeys(("codegen", "gptj"), GPT2_KEYS | {"rotary_dim": 4}),
    "bloom": PLAIN | {"n_layer": LAYERS, "n_head": HEADS},
    "ctrl": GPT2_KEYS | {"dff": HIDDEN},
    "cohere2": PLAIN | WINDOW,
    "exaone4": PLAIN | WINDOW,
    "falcon_h1": WITH_HEAD_DIM | MAMBA,
    "lfm2, convolutions": PLAIN | {"layer_types": ["conv", "full_attention"]},
    "llama, dynamic RoPE": PLAIN | {"max_position_embeddings": SHORT, "rope_parameters": DYNAMIC_ROPE},
    "llama4_text": EXPERTS | {"head_dim": HEAD, "intermediate_size_mlp": 48},
    "llama4_text, chunks": EXPERTS | {"head_dim": HEAD, "intermediate_size_mlp": 48} | CHUNKS,
    "minimax_m3_vl_text, sparse": EXPERTS
    | {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_block_size": 4, "index_topk_blocks": 1},
    "ministral": WITH_HEAD_DIM | WINDOW,
    "mistral, window": PLAIN | WINDOW,
    "mpt": {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS},
    "olmo3": PLAIN | WINDOW,
    "opt": PLAIN | {"ffn_dim": HIDDEN, "word_embed_proj_dim": HIDDEN},
    "phi3, LongRoPE": PLAIN | {"original_max_position_embeddings": SHORT, "rope_parameters": LONGROPE},
    "phi3, window": PLAIN | WINDOW,
    "qwen2, window": PLAIN | WINDOW | {"use_sliding_window": True, "max_window_layers": 0},
    "starcoder2, window": PLAIN | WINDOW,
    "xglm": PLAIN | {"d_model": HIDDEN, "num_layers": LAYERS, "attention_heads": HEADS, "ffn_dim": HIDDEN},
}
"""Configs by model type and, after a comma, variant."""

MASK_FREE = ("cohere", "gpt2", "gpt_neox", "granite", "llama", "olmo2", "opt", "phi", "qwen2", "qwen3")
"""Cases that must run without masks."""
LENGTH_DEPENDENT = ("llama, dynamic RoPE", "phi3, LongRoPE")
"""Cases whose position embedding depends on the length of the whole row, so that padding changes their logits too."""
MIXING = (
    *LENGTH_DEPENDENT,
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
"""Cases that mix the documents of a row without a mask: they compute their own positions, or keep state across the row,
or attend in chunks of the row."""


def draw_documents() -> list[list[int]]:
    """Return random tokens of each document."""
    return [[1 + token % (VOCABULARY - 1) for token in row["input_ids"]] for row in rows(DOCUMENTS)]


@functools.cache
def build_base(case: str) -> PreTrainedModel:
    """Return an unmodified transformers model, with weights large enough that each of them affects the logits."""
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
def compute_reference_logits(case: str) -> torch.Tensor:
    """Return the logits that predict the labels, one document per forward pass: (labels, vocabulary)."""
    logits = []
    for tokens, (_, prompt) in zip(draw_documents(), DOCUMENTS, strict=True):
        base = copy.deepcopy(build_base(case))  # some models store the length of the longest row so far
        with torch.no_grad():
            logits.append(base(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, prompt - 1 : -1])
    return torch.cat(logits)


@functools.cache
def build_cached_loss(case: str) -> tuple[CausalLMLoss, tuple[str, ...]]:
    """Return the loss of a copy of the base, and its notes."""
    return build_loss(copy.deepcopy(build_base(case)))


def collate_documents(collator: Collator) -> MicroBatch:
    """Return the documents in one micro-batch."""
    return collator.collate(draw_documents(), [prompt for _, prompt in DOCUMENTS])


def assert_matches_reference(case: str, collator: Collator) -> None:
    """Compare the logits at every label, the summed loss and the loss of each token with the reference."""
    (loss, _), expected, batch = build_cached_loss(case), compute_reference_logits(case), collate_documents(collator)
    with torch.no_grad(), loss.attention_context():
        logits, summed = loss.logits(loss.base, batch), loss(loss.base, batch)
        by_token = loss.per_token(loss.base, batch)
    difference = float((logits - expected).abs().max() / expected.abs().max())
    assert difference <= TOLERANCE, f"logits of {case} differ by {difference:.1e} with {type(collator).__name__}"
    expected_losses = cross_entropy(expected, batch.targets, reduction="none")
    assert summed.item() == pytest.approx(expected_losses.sum().item(), rel=TOLERANCE)
    assert float((by_token - expected_losses).abs().max() / expected_losses.max()) <= TOLERANCE


def test_sweep_has_cases_with_and_without_masks() -> None:
    """At least 80 architectures, 30 cases with masks and 30 without."""
    masked = {case for case in CASES if build_cached_loss(case)[0].uses_masks}
    assert len({case.split(",")[0] for case in CASES}) >= 80
    assert len(masked) >= 30
    assert len(CASES) - len(masked) >= 30


@pytest.mark.parametrize("case", CASES)
def test_batched_documents_match_separate_forward_passes(case: str) -> None:
    """Packed into one row without masks, and in padded rows; a case that needs masks states the reason in its notes."""
    loss, notes = build_cached_loss(case)
    assert loss.uses_masks == (loss.mask_reason is not None)
    if loss.uses_masks:
        assert loss.mask_reason
        assert any(loss.mask_reason in note for note in notes)
    else:
        assert_matches_reference(case, PaddingFreeCollator(0))
    if case not in LENGTH_DEPENDENT:
        assert_matches_reference(case, Collator(0))


@pytest.mark.parametrize("case", MASK_FREE)
def test_mask_free_architectures_use_no_masks(case: str) -> None:
    """This fails if the check refuses every architecture."""
    assert build_cached_loss(case)[0].mask_reason is None


@pytest.mark.parametrize("case", MIXING)
def test_mixing_architectures_use_masks(case: str) -> None:
    """The reason is recorded, and the attention implementation of the model is unchanged."""
    loss, _ = build_cached_loss(case)
    assert loss.mask_reason
    assert loss.uses_masks
    with loss.attention_context():
        assert loss.base.config._attn_implementation == build_base(case).config._attn_implementation


@pytest.mark.parametrize("case", MIXING)
def test_mixing_architectures_fail_without_masks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the check disabled, the comparison with the reference fails."""
    monkeypatch.setattr("peftbench.modeling.loss.find_mask_free_blocker", lambda _: None)
    build_cached_loss.cache_clear()
    try:
        assert not build_cached_loss(case)[0].uses_masks
        with pytest.raises((AssertionError, TypeError)):
            assert_matches_reference(case, PaddingFreeCollator(0))
    finally:
        build_cached_loss.cache_clear()
