"""The cache key of a feature store: which settings and tensors change it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftbench.feature_cache.key import build_cache_key, hash_encoded_examples, hash_frozen_part
from peftbench.methods.last_layer import LastLayer
from peftbench.modeling.loading import load_model
from peftbench.optim import AdamW
from tests.helpers.batches import LENGTHS_AND_PROMPTS, rows
from tests.helpers.cached_training import recipe
from tests.helpers.models import FAMILIES
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_key(
    workshop: Workshop, examples_hash: str = "e", device: str = "cpu", *, uses_masks: bool = False, **parts: Any
) -> Any:
    """Return the cache key of a recipe's backbone, loaded from disk."""
    run_recipe = recipe(workshop, "run", parts.pop("storage_dtype", "fp32"), **parts)
    base = load_model(run_recipe.model).model
    part = run_recipe.method.get_frozen_part(run_recipe.method.apply(base, None))  # type: ignore[arg-type]
    return build_cache_key(run_recipe, base, part, examples_hash, torch.device(device), uses_masks=uses_masks)


def test_cache_key_ignores_model_folder_and_training_settings(workshop: Workshop, tmp_path: Path) -> None:
    """Check that a copied model folder and other learning rate, seed and epochs keep the key."""
    key = build_key(workshop)
    shutil.copytree(workshop.base_folder("gpt2_tied"), tmp_path / "copy")
    assert build_key(workshop, model={"path": str(tmp_path / "copy")}) == key
    assert build_key(workshop, optimizer=AdamW(learning_rate=0.5), train={"seed": 3, "epochs": 1}) == key


def copy_with_another_weight(folder: Path, copy: Path) -> Path:
    """Copy a model folder and add 1 to one element of one tensor."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[min(tensors)].view(-1)[0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_cache_key_depends_on_everything_that_changes_hidden_states(workshop: Workshop, tmp_path: Path) -> None:
    """Change one setting, or one weight, at a time and check that all keys differ."""
    key = build_key(workshop)
    other_weights = copy_with_another_weight(workshop.base_folder("gpt2_tied"), tmp_path / "copy")
    other_keys = [
        build_key(workshop, **parts)
        for parts in (
            {"architecture": "llama_tied"},
            {"train": {"precision": "bf16"}},
            {"model": {"attention": "eager"}},
            {"model": {"fused_gelu": False}},
            {"storage_dtype": "bf16"},
            {"examples_hash": "f"},
            {"device": "cuda"},
            {"uses_masks": True},
            {"train": {"compile": True}},
            {"model": {"path": str(other_weights)}},
        )
    ]
    assert key not in other_keys
    assert len({repr(other_key) for other_key in other_keys}) == len(other_keys)


def test_hash_of_a_backbone_covers_every_tensor_except_the_head(fresh_base: Callable[[str], PreTrainedModel]) -> None:
    """Change one element of each parameter and buffer: only a change of the head keeps the hash."""
    for architecture in FAMILIES:
        base = fresh_base(architecture)
        part = LastLayer().get_frozen_part(LastLayer().apply(base, None))  # type: ignore[arg-type]
        original_hash = hash_frozen_part(base, part)
        head = base.get_output_embeddings().weight
        tensors = [*base.parameters(), *base.buffers()]
        assert len(tensors) > 10
        with torch.no_grad():
            for tensor in tensors:
                original = tensor.clone()
                tensor.view(-1)[-1] += 1
                assert (hash_frozen_part(base, part) == original_hash) is (tensor is head)
                tensor.copy_(original)
        assert hash_frozen_part(base, part) == original_hash


def test_hash_encoded_examples_covers_all_tokens_and_counts_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that tokens, spans of labels and order change the hash, and the block size does not change the counts.

    A row's first token is never predicted, so it is not counted.
    """
    from datasets import Dataset

    examples = [*rows(LENGTHS_AND_PROMPTS), {"input_ids": [5, 6, 7], "label_spans": [0, 3]}]

    def hash_and_count(rows_to_hash: list[dict[str, Any]]) -> tuple[str, list[int]]:
        digest, counts = hash_encoded_examples(Dataset.from_list(rows_to_hash))
        return digest, counts["labeled"].tolist()

    digest, counts = hash_and_count(examples)
    assert counts == [3, 9, 1, 14, 2]
    variants = [
        hash_and_count([*examples[:4], {"input_ids": [5, 6, 8], "label_spans": [0, 3]}]),
        hash_and_count([*examples[:4], {"input_ids": [5, 6, 7], "label_spans": [1, 3]}]),
        hash_and_count([*examples[1:], examples[0]]),
        hash_and_count(examples[:4]),
        hash_and_count(
            [*examples[:4], {"input_ids": [5, 6], "label_spans": [0, 2]}, {"input_ids": [7], "label_spans": [0, 1]}]
        ),
    ]
    assert digest not in {variant for variant, _ in variants}
    assert len({variant for variant, _ in variants}) == 5
    monkeypatch.setattr("peftbench.feature_cache.key._EXAMPLES_PER_BLOCK", 2)
    assert hash_and_count(examples)[1] == counts
