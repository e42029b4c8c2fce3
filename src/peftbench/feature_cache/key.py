"""Build the cache key: everything that hidden states depend on (frozen weights, examples, arithmetic), by content."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from peftbench.data.encode import count_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftbench.data.batches import EncodedExamples
    from peftbench.feature_cache.store import PositionKind
    from peftbench.methods.frozen_part import FrozenPart
    from peftbench.recipe.schema import Recipe

_EXAMPLES_PER_BLOCK = 1000  # examples per read
_PROVENANCE_KEYS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Config keys that describe a model's origin, not its function; library versions have their own entry in the key."""


def build_cache_key(
    recipe: Recipe,
    base: PreTrainedModel,
    part: FrozenPart,
    examples_hash: str,
    device: torch.device,
    *,
    uses_masks: bool,
) -> dict[str, Any]:
    """Return the cache key of the frozen ``part`` of ``base`` over examples with hash ``examples_hash``.

    ``uses_masks``: attention is transformers' own, with masks.
    """
    config = {key: value for key, value in base.config.to_diff_dict().items() if key not in _PROVENANCE_KEYS}
    return {
        "architecture": type(base).__qualname__,
        "code": hashlib.blake2b(Path(inspect.getfile(type(base))).read_bytes(), digest_size=16).hexdigest(),
        "config": hashlib.blake2b(repr(sorted(config.items())).encode(), digest_size=16).hexdigest(),
        "part": part.name,
        "weights": hash_frozen_part(base, part),
        "examples_hash": examples_hash,
        "precision": recipe.train.resolved_precision,
        "attention": recipe.model.attention,
        "uses_masks": uses_masks,
        "attention_precision": "float32" if device.type == "cpu" and not uses_masks else "precision",
        "fused_gelu": recipe.model.fused_gelu,
        "compile": recipe.train.compile,
        "quantization": recipe.model.quantization,
        "dtype": recipe.train.feature_cache,
        "device": device.type,  # kernels of other devices round in another order
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
    }


def hash_frozen_part(base: PreTrainedModel, part: FrozenPart) -> str:
    """Return a hash of the parameters and buffers that states may depend on: names, dtypes, shapes and bytes.

    Tensors of modules that run only above the part are excluded, unless another module shares them.
    """
    digest = hashlib.blake2b(digest_size=16)
    for module_name, module in sorted(base.named_modules(), key=lambda item: item[0]):
        if part.is_above(module_name):
            continue
        tensors = itertools.chain(
            module.named_parameters(module_name, recurse=False), module.named_buffers(module_name, recurse=False)
        )
        for name, tensor in sorted(tensors, key=lambda item: item[0]):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_encoded_examples(examples: EncodedExamples) -> tuple[str, dict[PositionKind, torch.Tensor]]:
    """Return a hash of all token ids and label spans, and the positions of each kind per example (int64)."""
    digest = hashlib.blake2b(digest_size=16)
    labeled: list[int] = []
    real: list[int] = []
    for start in range(0, len(examples), _EXAMPLES_PER_BLOCK):
        block = examples[list(range(start, min(start + _EXAMPLES_PER_BLOCK, len(examples))))]
        ids, spans = block["input_ids"], [[int(end) for end in row] for row in block["label_spans"]]
        for rows in (ids, spans):
            for numbers in ((len(row) for row in rows), itertools.chain.from_iterable(rows)):
                digest.update(_as_bytes(numbers))
        labeled += map(count_labels, spans)
        real += map(len, ids)
    counts: dict[PositionKind, list[int]] = {"labeled": labeled, "real": real}
    return digest.hexdigest(), {kind: torch.tensor(values, dtype=torch.int64) for kind, values in counts.items()}


def _as_bytes(numbers: Iterable[int]) -> memoryview:
    return numpy.fromiter(numbers, dtype=numpy.int64).data
