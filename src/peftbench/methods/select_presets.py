"""Presets of selective tuning: well-known selections of the base model's own parameters.

Each class names the source of its learning rate. None of these rates was tuned here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftbench.errors import OutOfRangeError, UnsupportedModelError
from peftbench.methods.selection import ParameterSelection, find_blocks, list_named_parameters, list_names_in_modules

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class BitFit(ParameterSelection):
    """Train all biases, those of normalizations included (BitFit, Ben Zaken et al. 2022, arXiv:2106.10199).

    Learning rate: 1e-3 with AdamW and batch 8, the default of the authors' code (github.com/benzakenelad/BitFit).
    """

    kind: Literal["bitfit"] = "bitfit"
    """Kind of method."""

    def select_names(self, base: PreTrainedModel) -> list[str]:
        names = [name for name, _ in list_named_parameters(base) if name.endswith("bias")]
        return _require(names, "biases", base, "use method.kind=layer_norm")


class LayerNorm(ParameterSelection):
    """Train the weights and biases of all normalizations (Qi et al. 2022, arXiv:2211.08682).

    Learning rate: 1e-4 with AdamW, that of LN tuning in peft's method comparison, where it was not tuned.
    """

    kind: Literal["layer_norm"] = "layer_norm"
    """Kind of method."""

    def select_names(self, base: PreTrainedModel) -> list[str]:
        names = list_names_in_modules(base, _is_normalization, recurse=False)
        return _require(names, "weights in normalizations", base, "use method.kind=attention")


class Embeddings(ParameterSelection):
    """Train the embedding of the input tokens alone (Artetxe et al. 2020, arXiv:1910.11856).

    Learning rate: that of full fine-tuning, whose weights these are; the paper trains new embeddings from scratch.
    """

    kind: Literal["embeddings"] = "embeddings"
    """Kind of method."""
    untie_head: bool = False
    """Give the head its own copy of the embedding if the model ties them, so that the head stays frozen."""

    @property
    def has_separate_head(self) -> bool:
        return self.untie_head

    def select_names(self, base: PreTrainedModel) -> list[str]:
        embedding = base.get_input_embeddings()
        return list_names_in_modules(base, lambda module: module is embedding, recurse=True)


class LastBlocks(ParameterSelection):
    """Train the last transformer blocks; embeddings, final normalization and head stay frozen.

    Learning rate: that of full fine-tuning, whose weights these are. Houlsby et al. 2019 (arXiv:1902.00751, section 3)
    compare adapters with training the top blocks only.
    """

    kind: Literal["last_blocks"] = "last_blocks"
    """Kind of method."""
    num_blocks: int = Field(default=1, gt=0)
    """Number of trained blocks, counted from the last one."""

    def select_names(self, base: PreTrainedModel) -> list[str]:
        blocks = find_blocks(base)
        if self.num_blocks > len(blocks):
            raise OutOfRangeError(
                f"method.num_blocks={self.num_blocks} is more than the {len(blocks)} blocks of this "
                f"{base.config.model_type}; set it to {len(blocks)} or less"
            )
        trained = {id(block) for _, block in blocks[-self.num_blocks :]}
        names = list_names_in_modules(base, lambda module: id(module) in trained, recurse=True)
        return _require(names, "parameters in its last blocks", base, "use method.kind=select")


class Attention(ParameterSelection):
    """Train the attention modules alone, with their projections and biases (Touvron et al. 2022, arXiv:2203.09795).

    Learning rate: that of full fine-tuning, whose weights these are; the paper does the same.
    """

    kind: Literal["attention"] = "attention"
    """Kind of method."""

    def select_names(self, base: PreTrainedModel) -> list[str]:
        names = list_names_in_modules(base, _is_attention, recurse=True)
        return _require(names, "attention modules", base, "use method.kind=select")


def _require(names: list[str], what: str, base: PreTrainedModel, hint: str) -> list[str]:
    """Return ``names``.

    Raises:
        UnsupportedModelError: there are none.
    """
    if not names:
        raise UnsupportedModelError(f"this {base.config.model_type} has no {what} to train; {hint}")
    return names


def _is_normalization(module: nn.Module) -> bool:
    """True for LayerNorm, RMSNorm and the architectures' own variants, by the name of their class."""
    return "norm" in type(module).__name__.lower()


def _is_attention(module: nn.Module) -> bool:
    """True for an architecture's attention module, by the name of its class, e.g. LlamaAttention."""
    return type(module).__name__.lower().endswith("attention")
