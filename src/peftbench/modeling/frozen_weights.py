"""Hold frozen weights in 16 bits: load them in that type, and convert those that were loaded or drawn in float32.

Trained weights and all buffers (rotary frequencies, scales) stay in float32. So do the few weights that transformers
keeps in float32 for an architecture, e.g. routers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from torch import nn

from peftbench.modeling.quantization import is_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def load_weights_in(dtype: torch.dtype) -> Iterator[None]:
    """Make ``from_pretrained(dtype=torch.float32)`` load weights in ``dtype``, and everything else in float32.

    Its own argument would round buffers as well, since it builds the whole model in that type.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel._get_dtype_plan

    def build_plan(model: PreTrainedModel, requested: torch.dtype) -> dict[str, torch.dtype]:
        plan: dict[str, torch.dtype] = original(model, requested)
        kept = _build_float32_pattern(model, dtype)
        names = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight.is_floating_point()]
        return plan | {f"^{re.escape(name)}$": dtype for name in names if not _matches(kept, name)}

    if dtype == torch.float32:
        yield
        return
    with patch.object(PreTrainedModel, "_get_dtype_plan", build_plan):
        yield


def convert_frozen_weights(base: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert the frozen weights of ``base`` to ``dtype``, after a method has chosen which weights are trained.

    Vectors (normalizations, biases) stay in float32 where they meet float32: in a module with a trained parameter, and
    everywhere if the embedding is float32, since normalizations on CPU accept no narrower weights then.
    """
    kept, has_float32_input = _build_float32_pattern(base, dtype), _has_float32_embedding(base)
    for module_name, module in base.named_modules():
        parameters = dict(module.named_parameters(module_name, recurse=False))
        keeps_vectors = has_float32_input or any(parameter.requires_grad for parameter in parameters.values())
        for name, parameter in parameters.items():
            if parameter.requires_grad or not parameter.is_floating_point() or is_packed(parameter):
                continue
            # peft puts an adapted matrix into a submodule.
            is_kept = (keeps_vectors and parameter.ndim < 2) or _matches(kept, name.replace(".base_layer.", "."))
            parameter.data = parameter.data.to(torch.float32 if is_kept else dtype)


def _has_float32_embedding(base: PreTrainedModel) -> bool:
    """True if hidden states start in float32: a trained embedding, or a table of positions, which is a buffer."""
    embeddings = [module.weight for module in base.modules() if isinstance(module, nn.Embedding)]
    tables = [buffer for buffer in base.buffers() if buffer.ndim == 2 and buffer.is_floating_point()]
    return bool(tables) or any(weight.requires_grad for weight in embeddings)


def _build_float32_pattern(base: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Return a pattern of the names that transformers keeps in float32 in a model of ``dtype``; None for none."""
    globs = set(base._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        globs |= set(base._keep_in_fp32_modules or ())
    return re.compile("|".join(glob.replace("*", ".*") for glob in sorted(globs))) if globs else None


def _matches(pattern: re.Pattern[str] | None, name: str) -> bool:
    return pattern is not None and pattern.search(name) is not None
