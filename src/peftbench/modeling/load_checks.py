"""Checks of a loaded base model, so that a run does not fail or mislead hours later."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from peftbench.errors import ModelError, ModelNotFoundError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OLD_BUFFERS = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq|position_ids)$")
"""Buffers that older versions of transformers saved, and that a model computes itself."""

_WRAPPERS = {"model", "language_model", "text_model"}
"""Names of modules around the parts of a text model."""


def check_vocabulary(num_tokens: int, model: PreTrainedModel, path: str) -> None:
    """Check that the embedding has a row for each token. ``model`` may be on the meta device.

    Raises:
        ModelError: the tokenizer has more tokens.
    """
    num_rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index,union-attr]
    if num_tokens > num_rows:
        raise ModelError(
            f"the tokenizer of {path} has {num_tokens:,} tokens, but the model's embedding has {num_rows:,} rows",
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
    """Return the number of ids that texts and their end can have: the largest such id plus one.

    Text never becomes a special token. Some tokenizers have special tokens beyond the embedding, e.g. for images.
    """
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unused = set(tokenizer.all_special_ids) - used
    unused |= {id for id, token in tokenizer.added_tokens_decoder.items() if token.special and id not in used}
    return max((id for id in tokenizer.get_vocab().values() if id not in unused), default=-1) + 1


def check_finite(model: PreTrainedModel, path: str) -> None:
    """Check that no weight is NaN or infinite.

    Raises:
        ModelError: one is; names the tensor.
    """
    import torch

    for name, parameter in model.named_parameters():
        # A sum is finite only if all terms are, and needs no copy; an overflowing sum is checked again.
        values = _get_values(parameter)
        if values is None or torch.isfinite(values.sum(dtype=torch.float32)):
            continue
        num_bad = int((~torch.isfinite(values)).sum())
        if num_bad:
            raise ModelError(
                f"{name} in {path} has {num_bad:,} values that are NaN or infinite",
                "download or convert the weights again",
            )


def _get_values(parameter: torch.Tensor) -> torch.Tensor | None:
    """Return the values of a weight, or the scales of a quantized one, which are NaN where its values were."""
    if (state := getattr(parameter, "quant_state", None)) is not None:  # 4 bits, maybe stored in a float dtype
        # Quantized scales hide a NaN, and their mean does not.
        absmax: torch.Tensor = state.offset.reshape(1) if state.nested else state.absmax
        return absmax
    if (scales := getattr(parameter, "SCB", None)) is not None:  # 8 bits
        return scales  # type: ignore[no-any-return]
    return parameter if parameter.is_floating_point() else None


def check_all_used(unexpected: Iterable[str], path: str) -> None:
    """Check that the model has a place for every tensor in the files.

    Raises:
        ModelError: it has none for some, e.g. because the config has fewer layers than the weights.
    """
    unused = sorted(name for name in unexpected if not _OLD_BUFFERS.search(name))
    if unused:
        raise ModelError(
            f"the weights in {path} have {len(unused):,} tensors that config.json does not describe, e.g. {unused[0]}",
            "restore the config.json that belongs to the weights",
        )


def select_text_weights(names: Iterable[str], model: PreTrainedModel) -> list[str]:
    """Return the names that belong to the text model ``model`` in the files of a multimodal one."""
    parts = set(map(_find_part, model.state_dict()))
    return [name for name in names if _find_part(name) in parts]


def _find_part(name: str) -> str:
    """Return the part of a text model in a weight's name, e.g. "layers" in "language_model.model.layers.0.norm"."""
    return next((key for key in name.split(".") if key not in _WRAPPERS), "")


def repair_tied_config(model: PreTrainedModel) -> str | None:
    """Set ``tie_word_embeddings`` of a config to what was loaded; return a note if it was wrong.

    transformers ties the head to the embedding only if the weights have no head of their own, or an equal one.
    """
    untied = model.get_expanded_tied_weights_keys(all_submodels=True).keys() - model.all_tied_weights_keys.keys()
    if not untied:
        return None
    model.config.tie_word_embeddings = False
    return (
        f"config.json ties {min(untied)} to the embedding, but the weights have other values for it: "
        "they were loaded, and the two are not tied"
    )


@cache
def count_tokens_in_folder(path: str) -> int | None:
    """Return the number of tokens of the tokenizer in a local folder; None if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return count_tokens(AutoTokenizer.from_pretrained(path, local_files_only=True))
    except Exception:  # an estimate needs no tokenizer; the run reports what is wrong with it
        return None
