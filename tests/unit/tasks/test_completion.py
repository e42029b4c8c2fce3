"""Completion: a prompt, a separator, and the text that follows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from peftbench.data.encode import Encoder, SequenceLayout
from peftbench.tasks.completion import Completion
from tests.helpers.tokenizers import character_tokenizer, list_labels, list_tokens, spaced_bpe_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def complete(
    prompt: str, completion: str, task: Completion, max_length: int = 100, start: str | None = "<s>"
) -> tuple[str, str, dict[str, int]]:
    """Return the listing of an example's labels and of its prompt, and its counts."""
    tokenizer = character_tokenizer(start=start)
    encoder = Encoder(tokenizer, SequenceLayout(max_length, 2), task)
    example = {"id": "0", "prompt": prompt, "completion": completion}
    row = encoder.encode_example(example)
    return list_labels(tokenizer, row), list_tokens(tokenizer, encoder.encode_prompt(example)), row


@pytest.mark.parametrize(
    ("keys", "labels", "prompt"),
    [
        ({}, "{s}2+2=[4{e}]", "{s}2+2="),
        ({"separator": "\n"}, "{s}2+2=\n[4{e}]", "{s}2+2=\n"),
        ({"separator": " -> "}, "{s}2+2= ->[ 4{e}]", "{s}2+2= ->"),
        ({"separator": "  "}, "{s}2+2=[  4{e}]", "{s}2+2="),
        ({"labels": "all"}, "{s}[2+2=4{e}]", "{s}2+2="),
        ({"labels": "all", "separator": " -> "}, "{s}[2+2= -> 4{e}]", "{s}2+2= ->"),
    ],
)
def test_completion_and_end_token_are_labeled(keys: dict[str, str], labels: str, prompt: str) -> None:
    """Spaces at the separator's end belong to the completion; a generation starts where the completion does."""
    assert complete("2+2=", "4", Completion(**keys))[:2] == (labels, prompt)  # type: ignore[arg-type]
    without_start = complete("2+2=", "4", Completion(**keys), start=None)  # type: ignore[arg-type]
    assert without_start[:2] == (labels.replace("{s}", ""), prompt.replace("{s}", ""))


def test_texts_are_used_as_they_are() -> None:
    """Spaces around them are kept, and the names of special tokens are text."""
    assert complete(" <s> a ", "\n<e> b ", Completion())[:2] == ("{s} <s> a [\n<e> b {e}]", "{s} <s> a ")


@pytest.mark.parametrize(("labels", "cut_labels"), [("completion", 0), ("all", 6)])
def test_too_long_a_prompt_loses_its_start(labels: str, cut_labels: int) -> None:
    """The separator and the completion stay, and what is lost is counted."""
    task = Completion(separator=":", labels=labels)  # type: ignore[arg-type]
    shown, prompt, row = complete("0123456789", "abc", task, max_length=10)
    assert shown.replace("[", "").replace("]", "") == "{s}6789:abc{e}"
    assert prompt == "{s}456789:"  # two tokens are reserved for a generation
    assert (row["cut_tokens"], row["cut_labels"]) == (6, cut_labels)
    assert row["needed"] == len("#9:abc#")
    assert row["prompt_needed"] == len("#9:")


def test_byte_level_tokens_are_those_of_the_whole_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """A separator that ends in a space does not leave it alone in a token."""
    encoder = Encoder(tokenizer, SequenceLayout(100, 2), Completion(separator=": "))
    example = {"id": "0", "prompt": "A question", "completion": "the answer"}
    whole = tokenizer("A question: the answer", add_special_tokens=False)["input_ids"]
    assert encoder.encode_example(example)["input_ids"] == [*whole, tokenizer.eos_token_id]
    assert encoder.encode_prompt(example) == tokenizer("A question:", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("separator", "text"),
    [("", "a bab a"), (" ", "a b ab a"), ("\n", "a b\nab a"), (": ", "a b: ab a")],
)
def test_sentencepiece_adds_no_space_between_the_parts(separator: str, text: str) -> None:
    """The only spaces are those of the file and of the recipe."""
    tokenizer = spaced_bpe_tokenizer()
    encoder = Encoder(tokenizer, SequenceLayout(100, 2), Completion(separator=separator))
    row = encoder.encode_example({"id": "0", "prompt": "a b", "completion": "ab a"})
    shown = str(tokenizer.decode(row["input_ids"], skip_special_tokens=True)).strip()
    assert shown == text
    assert encoder.decode(row["input_ids"][slice(*row["label_spans"])]) == "ab a"


def test_prompt_and_reference() -> None:
    """Both are the cells."""
    example = {"id": "0", "prompt": " a ", "completion": " b "}
    assert (Completion().get_prompt(example), Completion().get_reference(example)) == (" a ", " b ")
