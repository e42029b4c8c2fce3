"""Build a base model on the meta device: shapes from its config, no values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from peftbench.memory.families import with_bundled_config
from peftbench.modeling.attention import register_sdpa_attention
from peftbench.modeling.loading import LoadedModel, build_from_config, fuse_gelu, load_config

if TYPE_CHECKING:
    from torch import nn

    from peftbench.recipe.schema import Model

_BLOCK_SIZE, _NESTED_BLOCK_SIZE = 64, 256
"""Weights per scale, and scales per second-level scale with double quantization."""


def build_meta_model(model_config: Model, compute_dtype: torch.dtype) -> LoadedModel:
    """Build the model as :func:`peftbench.modeling.loading.load_model` does, from its config alone.

    ``compute_dtype`` is the dtype of computation with quantized weights. The result has no tokenizer.

    Raises:
        ModelNotFoundError, HubUnreachableError, UnsupportedModelError: as ``load_model``.
    """
    with with_bundled_config(model_config) as local_config, torch.device("meta"):
        model = build_from_config(local_config, load_config(local_config))
    register_sdpa_attention()
    if model_config.fused_gelu:
        fuse_gelu(model)
    if model_config.quantization is not None:
        _quantize_to_4bit(model, compute_dtype, double_quant=model_config.quantization == "nf4_double")
    return LoadedModel(model, None, "an architecture without weights")  # type: ignore[arg-type]


def _quantize_to_4bit(model: nn.Module, compute_dtype: torch.dtype, *, double_quant: bool) -> None:
    """Replace the layers that transformers would quantize with bitsandbytes' 4-bit layers."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=double_quant,
    )
    model.requires_grad_(False)
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), config)

    def empty(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    for module in model.modules():
        if isinstance(module, Linear4bit):
            shape = module.weight.shape
            scales = math.ceil(shape.numel() / _BLOCK_SIZE)
            nested: dict[str, Any] = {}
            if double_quant:
                code = empty(256, torch.float32)
                outer = empty(math.ceil(scales / _NESTED_BLOCK_SIZE), torch.float32)
                nested["state2"] = QuantState(outer, code=code, blocksize=_NESTED_BLOCK_SIZE, dtype=torch.float32)
                nested["offset"] = empty(1, torch.float32)[0]
            state = QuantState(
                empty(scales, torch.uint8 if double_quant else torch.float32),
                shape=shape,
                code=empty(16, torch.float32),
                blocksize=_BLOCK_SIZE,
                quant_type="nf4",
                dtype=torch.float32,
                **nested,
            )
            packed = torch.empty(((shape.numel() + 1) // 2, 1), dtype=torch.uint8, device="meta")
            module.weight = Params4bit(
                packed,
                quant_state=state,
                quant_type="nf4",
                compress_statistics=double_quant,
                module=module,
                bnb_quantized=True,
            )
            module.quant_state = state
