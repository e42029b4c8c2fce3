"""Soft tokens: trained vectors in front of every sequence, including sequences that share a row."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from peftbench.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def get_embedding_width(base: PreTrainedModel) -> int:
    """Return the width of the input embedding, which may differ from the hidden size."""
    return int(base.get_input_embeddings().weight.shape[1])  # type: ignore[index,union-attr]


def check_architecture(base: PreTrainedModel) -> None:
    """Check that a vector can stand for a token.

    Raises:
        UnsupportedModelError: the model looks up more than one embedding for a token.
    """
    if getattr(base.config, "hidden_size_per_layer_input", None):
        raise UnsupportedModelError(
            f"{base.config.model_type} looks up embeddings for each layer by token, and soft tokens have none; use "
            "another method, e.g. method.kind=lora"
        )


def check_generates_from_embeddings(base: PreTrainedModel, kind: str) -> None:
    """Check that the model generates from embeddings.

    Raises:
        UnsupportedModelError: it does not.
    """
    if "inputs_embeds" not in inspect.signature(base.prepare_inputs_for_generation).parameters:  # type: ignore[arg-type]
        raise UnsupportedModelError(
            f"{base.config.model_type} generates only from token ids, but {kind.replace('_', ' ')} needs embeddings; "
            "set evaluate.metrics=[], or use another method, e.g. method.kind=lora"
        )


def add_packed_forward(model: Any, base: PreTrainedModel) -> None:
    """Make a model of peft accept rows of several documents, each with its own soft tokens."""
    model.word_embeddings = base.get_input_embeddings()  # peft picks a parameter with vocab_size rows
    model.forward = partial(_forward_packed, model, model.forward)


def generate_after_soft_tokens(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **generate_kwargs: Any
) -> torch.Tensor:
    """Generate the tokens that follow left-padded prompts.

    peft puts the soft tokens before the padding and drops the position ids, so that a prompt's distance from them, and
    its generated text, would depend on the rest of the batch. Here they directly precede the prompt.
    """
    import torch

    base: PreTrainedModel = model.get_base_model()
    soft: torch.Tensor = model.get_prompt(len(input_ids))
    embedded = base.get_input_embeddings()(input_ids)
    mask = torch.cat((attention_mask.new_ones(soft.shape[:2]), attention_mask), dim=1)
    mask, order = mask.sort(dim=1, stable=True)  # padding first; a stable sort keeps the rest in order
    embeddings = torch.cat((soft.to(embedded.dtype), embedded), dim=1).take_along_dim(order[:, :, None], dim=1)
    # Without input_ids, transformers returns only the new tokens.
    new: torch.Tensor = base.generate(inputs_embeds=embeddings, attention_mask=mask, **generate_kwargs)  # type: ignore[operator]
    return new


def _forward_packed(
    model: Any,
    peft_forward: Callable[..., Any],
    *,
    virtual_token_indices: torch.Tensor | None = None,
    **model_inputs: Any,
) -> Any:
    """Run a forward pass in which each document of a row has its own soft tokens.

    ``virtual_token_indices`` (documents x tokens,) are their positions in the row. peft supports only one place, before
    the first token of a row; its forward pass is used if there are no indices.
    """
    if virtual_token_indices is None:
        return peft_forward(**model_inputs)
    base: PreTrainedModel = model.get_base_model()
    embedded = base.get_input_embeddings()(model_inputs.pop("input_ids"))
    soft = _get_soft_tokens(model, virtual_token_indices.device)
    soft = soft.repeat(len(virtual_token_indices) // len(soft), 1)
    return base(
        inputs_embeds=embedded.index_copy(1, virtual_token_indices, soft.to(embedded.dtype)[None]), **model_inputs
    )


def _get_soft_tokens(model: Any, device: torch.device) -> torch.Tensor:
    """Return the soft tokens (tokens, width).

    peft's get_prompt copies the token indices from the CPU on each call and so waits for the GPU.
    """
    import torch

    config, encoder = model.active_peft_config, model.prompt_encoder[model.active_adapter]
    if config.inference_mode:  # loaded: only the output of the encoder was saved
        soft: torch.Tensor = encoder.embedding.weight
        return soft
    tokens = torch.arange(config.num_virtual_tokens, device=device)
    soft = encoder(tokens[None])[0]
    return soft
