"""Checks of a loaded base model, so that a run does not fail or mislead hours later."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from peftbench.errors import ModelError, ModelNotFoundError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OLD_BUFFERS = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq|position_ids)$")
"""Buffers that older versions of transformers saved, and that a model computes itself."""


def check_vocabulary(num_tokens: int, model: PreTrainedModel, path: str) -> None:
    """Check that the embedding has a row for each token. ``model`` may be on the meta device.

    Raises:
        ModelError: the tokenizer has more tokens.
    """
    num_rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index,union-attr]
    if num_tokens > num_rows:
        raise ModelError(
            f"the tokenizer of {path} has {num_tokens:,} tokens, and the model's embedding has {num_rows:,} rows",
            "use the tokenizer that the model was trained with, or a model whose embedding was resized",
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Check that a tokenizer has a vocabulary: transformers builds an empty one where the files are missing.

    Raises:
        ModelNotFoundError: it has special tokens only.
    """
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ModelNotFoundError(
            f"{path} has no tokenizer (e.g. tokenizer.json)",
            "put the model's tokenizer files there, or set model.tokenizer to a folder that has them",
        )


def count_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of ids that a tokenizer can produce: its largest id plus one."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_finite(model: PreTrainedModel, path: str) -> None:
    """Check that no weight is NaN or infinite.

    Raises:
        ModelError: one is; names the tensor.
    """
    import torch

    for name, parameter in model.named_parameters():
        # A sum is finite only if all terms are, and needs no copy; an overflowing sum is checked again.
        is_packed = hasattr(parameter, "quant_state")  # 4-bit weights, also where they are stored in a float dtype
        if is_packed or not parameter.is_floating_point() or torch.isfinite(parameter.sum(dtype=torch.float32)):
            continue
        num_bad = int((~torch.isfinite(parameter)).sum())
        if num_bad:
            raise ModelError(
                f"{name} in {path} has {num_bad:,} values that are NaN or infinite",
                "download or convert the weights again",
            )


def check_all_used(unexpected: Iterable[str], path: str) -> None:
    """Check that the model has a place for every tensor in the files.

    Raises:
        ModelError: it has none for some, e.g. because the config has fewer layers than the weights.
    """
    unused = sorted(name for name in unexpected if not _OLD_BUFFERS.search(name))
    if unused:
        raise ModelError(
            f"config.json of {path} has no place for {len(unused):,} tensors of the weights, e.g. {unused[0]}",
            "restore the config.json that belongs to the weights",
        )


@cache
def count_tokens_in_folder(path: str) -> int | None:
    """Return the number of tokens of the tokenizer in a local folder; None if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return count_tokens(AutoTokenizer.from_pretrained(path, local_files_only=True))
    except Exception:  # an estimate needs no tokenizer; the run reports what is wrong with it
        return None
