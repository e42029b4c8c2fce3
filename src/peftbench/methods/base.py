"""The Method protocol: what is trained, and what a method must be able to say about it.

A method is a frozen part of the recipe (its knobs) that can be applied to a base. Whatever is special about one method
is a method of its class; nothing outside this folder asks which one it has.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peftbench.common.schema import ConfigSection

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Method(ConfigSection):
    """What is trained. Subclasses give ``kind`` a literal, so that a recipe can name them."""

    is_trainable: ClassVar[bool] = True
    """Whether there is anything to train; False for baselines."""
    needs_model: ClassVar[bool] = True
    """Whether it uses the base at all; False for baselines that only copy text."""

    kind: str
    """Which method."""

    @property
    def virtual_tokens(self) -> int:
        """Positions a sequence gains in front of its real tokens."""
        return 0

    @property
    def has_frozen_backbone(self) -> bool:
        """Whether all below the output head stays as it is, without dropout and in every step.

        No gradient is needed there, so the backward pass ends at the head; and what the trunk gives for an example is
        the same in every epoch, so it can be computed once (``train.feature_cache``).
        """
        return False

    def trainable_parameters(self, base: PreTrainedModel) -> int:
        """How many parameters this method trains on ``base`` (before :meth:`apply`), in closed form from its shapes.

        ``base`` may be on the meta device.
        """
        raise TypeError(f"{type(self).__name__} trains nothing")

    def apply(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        """Turn ``base`` into the model to train: ``requires_grad`` is set on exactly what is trained, in float32.

        Raises:
            ModelError: the method cannot handle this architecture, or its target modules match nothing.
        """
        raise TypeError(f"{type(self).__name__} trains nothing")

    def set_training(self, model: nn.Module) -> None:
        """Put the applied model into the mode it is trained in."""
        model.train()

    def generate(
        self, model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, **generate_kwargs: Any
    ) -> torch.Tensor:
        """New tokens (rows, at most ``max_new_tokens``) after prompts padded at the left.

        ``knobs`` are those of transformers' ``generate``.
        """
        output: torch.Tensor = model.generate(  # type: ignore[operator]
            input_ids=input_ids, attention_mask=attention_mask, **generate_kwargs
        )
        return output[:, input_ids.shape[1] :]

    def save(self, model: nn.Module, save_directory: Path) -> None:
        """Write what was trained to ``folder`` in its ecosystem's format, safetensors only."""
        model.save_pretrained(save_directory, safe_serialization=True)  # type: ignore[operator]

    def extract_summary(self, article: str) -> str | None:
        """The summary, where a baseline copies it from the article without a model; None otherwise."""
        return None


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """No gradient for any of ``parameters``."""
    for parameter in parameters:
        parameter.requires_grad_(False)
