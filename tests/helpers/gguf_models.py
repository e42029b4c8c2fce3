"""Small GGUF files, written as llama.cpp's converter does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from peftbench import shipped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf_llama(file: Path, model: PreTrainedModel, quantization: str) -> Path:
    """Write a Llama with the shipped tokenizer to a GGUF file; its matrices are F32, F16 or a kind like Q8_0."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    config: Any = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_name("Tiny Llama")
    writer.add_license("mit")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    kind = GGMLQuantizationType[quantization]
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = _to_llama_cpp(name, parameter.numpy(), config)
        is_matrix = values.ndim > 1
        data = quantize(values, kind) if is_matrix else values
        writer.add_tensor(_translate_name(name), data, raw_dtype=kind if is_matrix else GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _translate_name(name: str) -> str:
    known = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in known:
        return known[name]
    _, _, layer, rest = name.split(".", 3)
    module, suffix = rest.rsplit(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{suffix}"


def _to_llama_cpp(name: str, values: NDArray[Any], config: Any) -> NDArray[Any]:
    """Return the values in llama.cpp's order: it interleaves the two halves of rotated queries and keys."""
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    for suffix, count in heads.items():
        if name.endswith(suffix):
            rows = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
            return numpy.ascontiguousarray(rows.swapaxes(1, 2).reshape(values.shape))
    return values


def _add_tokenizer(writer: Any) -> None:
    from gguf import TokenType

    content = json.loads((shipped.SHIPPED_MODEL_DIR / "tokenizer.json").read_bytes())
    vocabulary = content["model"]["vocab"]
    special = {token["id"] for token in content["added_tokens"]}
    tokens = sorted(
        {**vocabulary, **{t["content"]: t["id"] for t in content["added_tokens"]}}.items(), key=lambda x: x[1]
    )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([TokenType.CONTROL if id in special else TokenType.NORMAL for _, id in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
