"""Tiny configs of many causal language models, two layers each. Sweeps over architectures share this list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY, HIDDEN, LAYERS, HEADS, HEAD = 64, 32, 2, 4, 8
SHORT = 16
"""Maximum positions of some variants: fewer than the tokens of the longest document."""

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

TINY_CONFIGS: dict[str, dict[str, Any]] = {
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


def build_tiny_model(case: str) -> PreTrainedModel:
    """Return an unmodified transformers model in float32, with transformers' random initialization from seed 0."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(case.split(",", maxsplit=1)[0], **TINY_CONFIGS[case])
    torch.manual_seed(0)
    base: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base.eval()
    return base
