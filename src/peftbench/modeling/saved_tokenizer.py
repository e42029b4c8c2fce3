"""Save a tokenizer with the chat template that a model was trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_template: str | None, folder: Path) -> None:
    """Save ``tokenizer`` in ``folder`` with this chat template, so that a chat with the model is rendered as trained.

    With None, the template is the tokenizer's own, if it has one. The tokenizer itself is not changed.
    """
    own = tokenizer.chat_template
    try:
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own
