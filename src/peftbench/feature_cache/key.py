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
    from torch import nn
    from transformers import PreTrainedModel

    from peftbench.data.batches import EncodedExamples
    from peftbench.recipe.schema import Recipe

_EXAMPLES_PER_BLOCK = 1000  # examples per read
_PROVENANCE_KEYS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Config keys that describe a model's origin, not its function; library versions have their own entry in the key."""


def build_cache_key(
    recipe: Recipe, base: PreTrainedModel, examples_hash: str, device: torch.device, *, uses_masks: bool
) -> dict[str, Any]:
    """Return the cache key of a recipe's frozen backbone over examples with hash ``examples_hash``.

    ``uses_masks``: attention is transformers' own, with masks.
    """
    config = {key: value for key, value in base.config.to_diff_dict().items() if key not in _PROVENANCE_KEYS}
    return {
        "architecture": type(base).__qualname__,
        "code": hashlib.blake2b(Path(inspect.getfile(type(base))).read_bytes(), digest_size=16).hexdigest(),
        "config": hashlib.blake2b(repr(sorted(config.items())).encode(), digest_size=16).hexdigest(),
        "weights": hash_backbone(base),
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


def hash_backbone(base: PreTrainedModel) -> str:
    """Return a hash of every parameter and buffer except the head's: names, dtypes, shapes and bytes."""
    head: nn.Module | None = base.get_output_embeddings()
    excluded = set() if head is None else {id(tensor) for tensor in itertools.chain(head.parameters(), head.buffers())}
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(itertools.chain(base.named_parameters(), base.named_buffers())):
        if id(tensor) not in excluded:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_encoded_examples(examples: EncodedExamples) -> tuple[str, torch.Tensor]:
    """Return a hash of all token ids and label spans, and the number of labeled positions per example (int64)."""
    digest = hashlib.blake2b(digest_size=16)
    counts: list[int] = []
    for start in range(0, len(examples), _EXAMPLES_PER_BLOCK):
        block = examples[list(range(start, min(start + _EXAMPLES_PER_BLOCK, len(examples))))]
        ids, spans = block["input_ids"], [[int(end) for end in row] for row in block["label_spans"]]
        for rows in (ids, spans):
            for numbers in ((len(row) for row in rows), itertools.chain.from_iterable(rows)):
                digest.update(_as_bytes(numbers))
        counts += map(count_labels, spans)
    return digest.hexdigest(), torch.tensor(counts, dtype=torch.int64)


def _as_bytes(numbers: Iterable[int]) -> memoryview:
    return numpy.fromiter(numbers, dtype=numpy.int64).data
