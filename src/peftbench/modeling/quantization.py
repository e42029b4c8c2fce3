"""Quantized base models: those that are quantized when they are loaded, and those that were saved quantized.

The config.json of a folder with quantized weights has a ``quantization_config``. Its kind replaces
``model.quantization`` before a run or plan starts, so that the same rules apply to both.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from peftbench.errors import OutOfRangeError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

    from peftbench.recipe.schema import Model

Quantization = Literal["nf4", "nf4_double", "int8"]
_MIN_NOTED_SHARE = 0.01
"""Smaller parts of a model that stay unquantized are not noted: routers, short convolutions."""


def read_stored_quantization(config: PreTrainedConfig, model_path: str) -> Quantization | None:
    """Return the quantization of the stored weights of a folder or Hub repository; None if they are not quantized.

    Raises:
        UnsupportedModelError: they are quantized in a way that peftbench cannot train on.
    """
    stored = _get_stored_config(config)
    if stored is None:
        return None
    if stored.get("load_in_8bit"):
        return "int8"
    is_4bit = bool(stored.get("load_in_4bit"))
    if is_4bit and stored.get("bnb_4bit_quant_type") == "nf4":
        return "nf4_double" if stored.get("bnb_4bit_use_double_quant") else "nf4"
    kind = stored.get("bnb_4bit_quant_type", "fp4") if is_4bit else stored.get("quant_method", "an unknown method")
    raise UnsupportedModelError(
        f"the weights of {model_path} are quantized with {kind} (quantization_config in its config.json), and "
        "peftbench supports nf4 and int8 of bitsandbytes; set model.path to an unquantized copy, which "
        "model.quantization=nf4 quantizes at load"
    )


def resolve_quantization(model_config: Model, config: PreTrainedConfig, model_path: str) -> Quantization | None:
    """Return the quantization of the base model: the stored one, else the recipe's.

    Raises:
        OutOfRangeError: the recipe asks for another kind than the stored one.
        UnsupportedModelError: as :func:`read_stored_quantization`.
    """
    stored = read_stored_quantization(config, model_path)
    requested = model_config.quantization
    if stored is None or requested in {stored, None}:
        return stored or requested
    raise OutOfRangeError(
        f"model.quantization={requested}, but the weights of {model_path} are stored in {stored}; set "
        f"model.quantization to {stored} or null"
    )


def build_quantization_config(
    model_config: Model, config: PreTrainedConfig, compute_dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """Return the arguments of bitsandbytes for the base model, None if it is not quantized.

    ``compute_dtype`` is the dtype of matmuls with 4-bit weights. It replaces the dtype in a folder's config, which
    whoever saved the weights chose. The modules that the folder skips are kept.

    Raises:
        OutOfRangeError: random weights are to be quantized.
    """
    from transformers import BitsAndBytesConfig

    if model_config.quantization is not None and model_config.init == "random":
        raise OutOfRangeError("model.quantization needs pretrained weights; set model.init=pretrained")
    stored = _get_stored_config(config)
    if stored is not None:
        return BitsAndBytesConfig.from_dict(stored | {"bnb_4bit_compute_dtype": compute_dtype})  # type: ignore[no-any-return]
    if model_config.quantization is None:
        return None
    if model_config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=model_config.quantization == "nf4_double",
    )


def convert_unquantized_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert unquantized parameters to ``dtype``. transformers leaves some in the dtype of the folder."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not is_packed(parameter):
            parameter.data = parameter.data.to(dtype)


def disable_cpu_repacking(model: PreTrainedModel) -> None:
    """Keep 4-bit weights in one layout on CPU, so that evaluation computes what training does.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks them in the first forward pass in evaluation mode: it rounds
    scales to bf16, multiplies in bf16, and fails for widths that are not multiples of 64.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def describe_unquantized_modules(model: PreTrainedModel) -> str | None:
    """Return which matrices of a quantized model are not quantized, apart from embeddings and head; None for none.

    transformers quantizes linear layers. Stacked experts are a parameter of another module, and a folder's config may
    skip modules. Layers are joined: ``model.layers.*.mlp.experts (73 % of the parameters)``.
    """
    from torch import nn

    exempt = {id(module) for module in model.modules() if isinstance(module, nn.Embedding)}
    exempt.add(id(model.get_output_embeddings()))
    total = model.num_parameters()
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if id(module) in exempt:
            continue
        matrices = [p for p in module.parameters(recurse=False) if p.ndim > 1 and not is_packed(p)]
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        sizes[pattern] = sizes.get(pattern, 0) + sum(parameter.numel() for parameter in matrices)
    shares = [(pattern, size / total) for pattern, size in sizes.items() if size / total >= _MIN_NOTED_SHARE]
    return ", ".join(f"{pattern} ({share:.0%} of the parameters)" for pattern, share in shares) or None


def is_packed(parameter: torch.Tensor) -> bool:
    """True for a quantized matrix, whose elements are packed bytes or integers."""
    from bitsandbytes.nn.modules import Int8Params, Params4bit

    return isinstance(parameter, Int8Params | Params4bit)


def get_dequantized_dtype(config: PreTrainedConfig, load_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to which quantized weights are dequantized: ``load_dtype`` if they are quantized at load.

    For stored weights it is the config's dtype, which is that of the model when it was saved. The exact dtype of each
    weight is stored with it, and the config is all that an estimate has.
    """
    import torch

    if _get_stored_config(config) is None:
        return load_dtype
    return getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype or torch.float32


def _get_stored_config(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return the ``quantization_config`` of a model's config.json, None if it has none."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    return dict(stored) if isinstance(stored, dict) else dict(stored.to_dict())
