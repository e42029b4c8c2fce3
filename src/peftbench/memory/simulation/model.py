"""Build a base model on the meta device: shapes from its config, no values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftbench.memory.families import with_bundled_config
from peftbench.memory.simulation.repeating_layers import keep_layers
from peftbench.modeling.attention import register_sdpa_attention
from peftbench.modeling.load_checks import check_vocabulary, count_tokens_in_folder
from peftbench.modeling.loading import LoadedModel, build_from_config, fuse_gelu, load_config, resolve_model_path
from peftbench.modeling.quantization import build_quantization_config, get_dequantized_dtype

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from peftbench.recipe.schema import Model

_BLOCK_SIZE, _NESTED_BLOCK_SIZE = 64, 256
"""Weights per scale, and scales per second-level scale with double quantization."""


def build_meta_model(
    model_config: Model,
    compute_dtype: torch.dtype,
    weight_dtype: torch.dtype = torch.float32,
    *,
    kept_layers: Sequence[int] | None = None,
) -> LoadedModel:
    """Build the model as :func:`peftbench.modeling.loading.load_model` does, from its config alone.

    ``compute_dtype`` is the dtype of computation with quantized weights, and ``weight_dtype`` that in which weights are
    loaded before they are quantized. Unquantized weights are float32 until the method is applied. The result has no
    tokenizer. With ``kept_layers`` the model has only the layers with these indices.

    Raises:
        ModelNotFoundError, HubUnreachableError, UnsupportedModelError: as ``load_model``.
    """
    with with_bundled_config(model_config) as local_config, torch.device("meta"):
        config = load_config(local_config)
        if kept_layers is not None:
            keep_layers(config, kept_layers)
        quantization = build_quantization_config(local_config, config, compute_dtype)
        dtype = get_dequantized_dtype(config, weight_dtype)  # building the model sets the config's dtype
        model = build_from_config(local_config, config)
    path = model_config.tokenizer or resolve_model_path(model_config)
    if Path(path).is_dir() and (num_tokens := count_tokens_in_folder(path)) is not None:
        check_vocabulary(num_tokens, model, path)
    register_sdpa_attention()
    if model_config.fused_gelu:
        fuse_gelu(model)
    if quantization is not None:
        _quantize_to_4bit(model, quantization, dtype)
    return LoadedModel(model, None, "an architecture without weights")  # type: ignore[arg-type]


def _quantize_to_4bit(model: PreTrainedModel, config: BitsAndBytesConfig, dtype: torch.dtype) -> None:
    """Replace the layers that transformers would quantize with bitsandbytes' 4-bit layers.

    ``dtype`` is that of the weights before they were quantized, to which they are dequantized.
    """
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    model.requires_grad_(False)
    kept = list(model._keep_in_fp32_modules or ())
    skipped = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, kept)
    replace_with_bnb_linear(model, skipped, config)
    double_quant = config.bnb_4bit_use_double_quant

    def empty(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    model.is_loaded_in_4bit = True  # type: ignore[assignment] # num_parameters then counts unpacked elements
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
                dtype=dtype,
                **nested,
            )
            storage = config.bnb_4bit_quant_storage
            packed = torch.empty(((shape.numel() + 1) // 2 // storage.itemsize, 1), dtype=storage, device="meta")
            module.weight = Params4bit(
                packed,
                quant_state=state,
                quant_type="nf4",
                quant_storage=storage,
                compress_statistics=double_quant,
                module=module,
                bnb_quantized=True,
            )
            module.quant_state = state
