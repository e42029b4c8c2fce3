"""The listing of examples that ``peftbench data`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from peftbench.cli.data_view import print_examples
from peftbench.data.encode import Encoder, SequenceLayout
from peftbench.tasks.chat import Chat
from peftbench.tasks.completion import Completion
from peftbench.training.data_summary import DataSummary, EncodedExample
from tests.helpers.conversations import CHATML, as_conversation, assistant, chat_encoder, chatml_tokenizer, user
from tests.helpers.tokenizers import character_tokenizer


def list_example(encoder: Encoder, example: Mapping[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the listing of one example."""
    row = encoder.encode_example(example)
    whole = encoder.tokenize_whole(example)
    shown = [EncodedExample("0", row["input_ids"], row["label_spans"], whole)]
    print_examples(DataSummary("train", encoder.layout.max_length, [], [], 0, 0, 0, 0, shown), encoder, ids=False)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("max_length", "listing"),
    [
        (100, "example 0 of train: 16 tokens, 4 labeled\n<s>0123456789:⟦abc<e>⟧\n\n"),
        (10, "example 0 of train: 10 tokens, 4 labeled, 6 cut\n<s>⟨012345⟩6789:⟦abc<e>⟧\n\n"),
    ],
)
def test_cut_tokens_are_listed_where_they_stood(
    max_length: int, listing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A long prompt is cut at its start, after the start token."""
    encoder = Encoder(character_tokenizer(start="<s>"), SequenceLayout(max_length, 2), Completion(separator=":"))
    assert list_example(encoder, {"id": "0", "prompt": "0123456789", "completion": "abc"}, capsys) == listing


def test_whole_turns_are_cut_behind_the_system_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    """A conversation that is too long loses its first turns."""
    turns = [{"role": "system", "content": "S"}, user("one"), assistant("1"), user("two"), assistant("2")]
    encoder = chat_encoder(chatml_tokenizer(CHATML), Chat(), max_length=50)
    assert list_example(encoder, as_conversation(turns), capsys) == (
        "example 0 of train: 36 tokens, 2 labeled, 25 cut\n<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n"
        "⟨one<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\n⟩"
        "two<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>⟧\n\n\n"
    )
