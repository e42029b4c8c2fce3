"""The name of a store: whatever changes a hidden state is in it, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from peftbench.feature_cache.key import build_cache_key, hash_backbone, hash_examples
from peftbench.methods.last_layer import LastLayer
from peftbench.modeling.loading import load_model
from peftbench.optim import AdamW
from tests.helpers.batches import LENGTHS_AND_PROMPTS, rows
from tests.helpers.cached_training import recipe
from tests.helpers.models import FAMILIES
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def identity(
    workshop: Workshop, examples: str = "e", device: str = "cpu", *, masked: bool = False, **parts: Any
) -> Any:
    """Of a recipe's trunk, loaded anew."""
    made = recipe(workshop, "run", parts.pop("stored", "fp32"), **parts)
    base = load_model(made.model).model
    LastLayer().apply(base, None)  # type: ignore[arg-type]
    return build_cache_key(made, base, examples, torch.device(device), uses_masks=masked)


def test_where_a_trunk_came_from_does_not_matter(workshop: Workshop, tmp_path: Path) -> None:
    """A copy in another folder, another rate, seed, schedule or length: the same states."""
    mine = identity(workshop)
    shutil.copytree(workshop.base_folder("gpt2_tied"), tmp_path / "copy")
    assert identity(workshop, model={"path": str(tmp_path / "copy")}) == mine
    assert identity(workshop, optimizer=AdamW(learning_rate=0.5), train={"seed": 3, "epochs": 1}) == mine


def test_whatever_changes_states_changes_the_name(workshop: Workshop) -> None:
    """One thing at a time, each of which gives another."""
    mine = identity(workshop)
    others = [
        identity(workshop, **parts)
        for parts in (
            {"architecture": "llama_tied"},
            {"train": {"precision": "bf16"}},
            {"model": {"attention": "eager"}},
            {"model": {"fused_gelu": False}},
            {"stored": "bf16"},
            {"examples": "f"},
            {"device": "cuda"},
            {"masked": True},
            {"train": {"compile": True}},
        )
    ]
    assert mine not in others
    assert len({repr(other) for other in others}) == len(others)


def test_every_frozen_tensor_is_in_the_hash_and_the_head_is_not(fresh_base: Callable[[str], PreTrainedModel]) -> None:
    """One value of one parameter or buffer is enough; what training moves is nothing to the trunk."""
    for architecture in FAMILIES:
        base = fresh_base(architecture)
        LastLayer().apply(base, None)  # type: ignore[arg-type]
        before = hash_backbone(base)
        head = base.get_output_embeddings().weight
        tensors = [*base.parameters(), *base.buffers()]
        assert len(tensors) > 10
        with torch.no_grad():
            for tensor in tensors:
                kept = tensor.clone()
                tensor.view(-1)[-1] += 1
                assert (hash_backbone(base) == before) is (tensor is head)
                tensor.copy_(kept)
        assert hash_backbone(base) == before


def test_examples_are_hashed_whole_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token and in their order, however they are read; a row's first token is never predicted."""
    from datasets import Dataset

    made = [*rows(LENGTHS_AND_PROMPTS), {"input_ids": [5, 6, 7], "prompt_tokens": 0}]

    def read(examples: list[dict[str, Any]]) -> tuple[str, list[int]]:
        digest, counts = hash_examples(Dataset.from_list(examples))
        return digest, counts.tolist()

    digest, counts = read(made)
    assert counts == [3, 9, 1, 14, 2]
    others = [
        read([*made[:4], {"input_ids": [5, 6, 8], "prompt_tokens": 0}]),
        read([*made[:4], {"input_ids": [5, 6, 7], "prompt_tokens": 1}]),
        read([*made[1:], made[0]]),
        read(made[:4]),
        read([*made[:4], {"input_ids": [5, 6], "prompt_tokens": 0}, {"input_ids": [7], "prompt_tokens": 0}]),
    ]
    assert digest not in {other for other, _ in others}
    assert len({other for other, _ in others}) == 5
    monkeypatch.setattr("peftbench.feature_cache.key._EXAMPLES_PER_BLOCK", 2)
    assert read(made)[1] == counts
