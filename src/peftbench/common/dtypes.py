"""Torch's dtypes by the names that recipes use."""

from __future__ import annotations

import torch

TORCH_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def get_autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype that autocast computes in, None for fp32, which needs no autocast."""
    return None if precision == "fp32" else TORCH_DTYPES[precision]
