"""Conversations, and encoders that render them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from peftbench.data.encode import Encoder, SequenceLayout
from peftbench.tasks.chat import TEMPLATE_DIR, Chat
from tests.helpers.tokenizers import character_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from peftbench.data.readers.rows import Example

Message = dict[str, Any]
CHATML = (TEMPLATE_DIR / "chatml.jinja").read_text(encoding="utf-8")


def user(content: str) -> Message:
    """Return a message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """Return a message of the assistant."""
    return {"role": "assistant", "content": content}


def as_conversation(messages: Sequence[Message]) -> Example:
    """Return a conversation as a row of a data set."""
    return {"id": "0", "messages": json.dumps(messages)}


def chatml_tokenizer(template: str = CHATML) -> PreTrainedTokenizerBase:
    """Return a tokenizer of characters with ChatML's special tokens and a template."""
    return character_tokenizer("<|im_start|>", "<|im_end|>", template=template)


def chat_encoder(
    tokenizer: PreTrainedTokenizerBase, task: Chat, max_length: int = 500, max_new_tokens: int = 0
) -> Encoder:
    """Return an encoder of conversations."""
    return Encoder(tokenizer, SequenceLayout(max_length, max_new_tokens), task)
