"""Last-layer tuning: trains the output head, with three definitions of it.

The head of a causal language model is usually tied to the input embedding, so "train only the last layer" has two
meanings (untied, tied). A published study used a third (outside_blocks).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peftbench.errors import UnsupportedModelError
from peftbench.methods.selection import ParameterSelection, get_output_head, list_head_names, list_named_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GPT2_BLOCK_PREFIX = "transformer.h."


class LastLayer(ParameterSelection):
    """Train the output head."""

    kind: Literal["last_layer"] = "last_layer"
    """Kind of method."""
    head: Literal["untied", "tied", "outside_blocks"] = "untied"
    """untied (a copy; backbone frozen), tied (shared with the embedding), outside_blocks (all but "transformer.h.")."""

    @property
    def has_frozen_backbone(self) -> bool:
        return self.head == "untied"

    @property
    def supports_feature_cache(self) -> bool:
        return self.has_frozen_backbone

    @property
    def has_separate_head(self) -> bool:
        return self.head == "untied"

    def select_names(self, base: PreTrainedModel) -> list[str]:
        """Return the head's parameters (its matrix and bias); outside_blocks: every parameter outside the blocks."""
        if self.head == "outside_blocks":
            return _select_outside_gpt2_blocks(base)
        tied = get_output_head(base).weight is base.get_input_embeddings().weight
        if self.head == "tied" and not tied:
            raise UnsupportedModelError(
                f"method.head=tied needs a model that ties its head to its embedding, and {base.config.model_type} "
                f"from {base.name_or_path!r} does not; use method.head=untied"
            )
        return list_head_names(base)


def _select_outside_gpt2_blocks(base: PreTrainedModel) -> list[str]:
    names = [name for name, _ in list_named_parameters(base)]
    outside = [name for name in names if GPT2_BLOCK_PREFIX not in name]
    if len(outside) == len(names):
        raise UnsupportedModelError(
            f"method.head=outside_blocks freezes names with {GPT2_BLOCK_PREFIX!r}; {base.config.model_type} has none; "
            "use a GPT-2 model or method.head=untied"
        )
    return outside
