"""The frozen part of a model: which blocks it has, which modules train, and what its hash depends on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from peftbench.feature_cache.key import hash_frozen_part
from peftbench.methods.frozen_part import FrozenPart
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.select import Select
from peftbench.methods.select_presets import BitFit, LastBlocks
from peftbench.methods.selection import ParameterSelection, find_blocks
from tests.helpers.architectures import build_tiny_model
from tests.helpers.models import FAMILIES, gpt2_config, llama_config, random_base

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

HEAD = r"lm_head\.weight"


def apply(method: ParameterSelection, base: PreTrainedModel) -> FrozenPart:
    """Apply a method to ``base``, in training mode, and return the frozen part."""
    model = method.apply(base, None)  # type: ignore[arg-type]
    method.set_training(model)
    return method.get_frozen_part(model)


def list_training_modules(base: PreTrainedModel) -> set[str]:
    """Return the names of the modules in training mode."""
    return {name for name, module in base.named_modules() if module.training}


@pytest.mark.parametrize(
    ("train", "num_frozen"),
    [
        (r"model\.layers\.3\..*", 3),
        (r"model\.layers\.[13]\.mlp\..*", 1),
        (r"model\.layers\.2\.self_attn\.k_proj\.weight|model\.norm\.weight", 2),
        (r"model\.norm\.weight", 4),
        (r"model\.norm\.weight|lm_head\.weight", 4),
    ],
)
def test_frozen_blocks_end_at_the_lowest_trained_one(train: str, num_frozen: int) -> None:
    """They and all modules outside blocks are in evaluation mode; the blocks above them are in training mode."""
    base = random_base(llama_config(num_hidden_layers=4, tie_word_embeddings=False))
    part = apply(Select(train=train), base)
    names = [name for name, _ in find_blocks(base)]
    assert part.block_names == tuple(names[:num_frozen])
    assert part.upper_block_names == tuple(names[num_frozen:])
    assert part.has_all_blocks is (num_frozen == 4)
    assert not part.is_empty
    assert not part.is_backbone
    upper = {
        name for name, _ in base.named_modules() if name.startswith(tuple(f"{name}." for name in names[num_frozen:]))
    }
    assert list_training_modules(base) == upper | set(names[num_frozen:])


def test_head_alone_has_a_frozen_backbone() -> None:
    """A selection of the head is the same as last_layer; nothing is in training mode."""
    for method in (LastLayer(), Select(train=HEAD, untie_head=True)):
        base = random_base(gpt2_config())
        part = apply(method, base)
        assert part.is_backbone
        assert part.has_all_blocks
        assert part.list_modules(base) == [base.base_model]
        assert not list_training_modules(base)


@pytest.mark.parametrize(
    "method",
    [BitFit(), LastBlocks(num_blocks=2), Select(train=HEAD), Select(train=r".*wpe\.weight"), LastLayer(head="tied")],
)
def test_part_below_the_first_block_is_empty(method: ParameterSelection) -> None:
    """Every module is in training mode, with its dropout."""
    base = random_base(gpt2_config())
    part = apply(method, base)
    assert part.is_empty
    assert part.list_modules(base) == []
    assert list_training_modules(base) == {name for name, _ in base.named_modules()}


def test_order_of_modules_is_that_of_the_forward_pass() -> None:
    """OPT's final normalization is listed before its blocks and runs after them."""
    base = build_tiny_model("opt")
    part = apply(Select(train=r".*decoder\.(layers\.1\..*|final_layer_norm\..*)"), base)
    assert len(part.block_names) == 1
    assert part.is_above("model.decoder.final_layer_norm")
    assert not part.is_above("model.decoder.embed_positions")


def test_method_without_a_selection_has_no_frozen_part() -> None:
    """Full fine-tuning trains every block."""
    base = random_base(gpt2_config())
    assert Full().get_frozen_part(Full().apply(base, None)).is_empty  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_hash_covers_every_tensor_below_the_cut(
    architecture: str, fresh_base: Callable[[str], PreTrainedModel]
) -> None:
    """A change of one element changes the hash, except in the last block and above; a tied head counts as below."""
    base = fresh_base(architecture)
    part = apply(LastBlocks(), base)
    before = hash_frozen_part(base, part)
    head = base.get_output_embeddings().weight
    is_tied = head is base.get_input_embeddings().weight
    kept: set[str] = set()
    names = [name for name, _ in (*base.named_parameters(), *base.named_buffers())]
    with torch.no_grad():
        for name, tensor in (*base.named_parameters(), *base.named_buffers()):
            original = tensor.clone()
            tensor.view(-1)[-1] += 1
            if hash_frozen_part(base, part) == before:
                kept.add(name)
            tensor.copy_(original)
    (last,) = part.upper_block_names
    norm = "transformer.ln_f." if architecture.startswith("gpt2") else "model.norm."
    expected = {
        name for name in names if name.startswith((f"{last}.", norm)) or (name.startswith("lm_head.") and not is_tied)
    }
    assert kept == expected
    assert hash_frozen_part(base, part) == before
