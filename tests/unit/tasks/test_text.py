"""Text: every token of a document is labeled."""

from __future__ import annotations

import pytest

from peftbench.data.collate import Collator
from peftbench.data.encode import Encoder, SequenceLayout
from peftbench.errors import DataError
from peftbench.tasks.text import Text
from tests.helpers.tokenizers import character_tokenizer, list_labels, word_tokenizer


@pytest.mark.parametrize(("start", "labels"), [(None, "[a b{e}]"), ("<s>", "{s}[a b{e}]")])
def test_document_and_end_token_are_labeled(start: str | None, labels: str) -> None:
    """The start token is not predicted, and neither is a first token without one."""
    tokenizer = character_tokenizer(start=start)
    row = Encoder(tokenizer, SequenceLayout(100, 0), Text()).encode_example({"id": "0", "text": "a b"})
    assert list_labels(tokenizer, row) == labels
    batch = Collator(0).collate([row["input_ids"]], [row["label_spans"]])
    assert batch.targets.tolist() == row["input_ids"][1:]


def test_too_long_a_document_loses_its_end() -> None:
    """The lost tokens are lost labels; the end token stays."""
    tokenizer = character_tokenizer(start="<s>")
    row = Encoder(tokenizer, SequenceLayout(6, 0), Text()).encode_example({"id": "0", "text": "0123456789"})
    assert list_labels(tokenizer, row) == "{s}[0123{e}]"
    assert (row["cut_tokens"], row["cut_labels"], row["needed"]) == (6, 6, 3)


def test_document_of_one_token_without_a_start_token_has_the_end_token_as_its_label() -> None:
    """A text that the tokenizer drops has no label at all and is refused."""
    encoder = Encoder(word_tokenizer(), SequenceLayout(6, 0), Text())
    assert encoder.encode_example({"id": "0", "text": "a"})["label_spans"] == [0, 2]
    with pytest.raises(DataError, match=r"^example 3 has no labeled token; remove it$"):
        encoder.encode_example({"id": "3", "text": " \n"})


def test_there_is_no_prompt_and_nothing_is_generated() -> None:
    """Only held-out loss is evaluated, so an overlap of prompts is not counted."""
    example = {"id": "0", "text": "a"}
    assert (Text().get_prompt(example), Text().get_reference(example)) == ("", "a")
    assert (Text.evaluation, Text.metrics, Text.headline_metric) == ("loss", (), None)
    assert Text.labels_whole_row
