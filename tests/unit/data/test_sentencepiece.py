"""Tokenizers that add a space before every text, as SentencePiece does."""

from __future__ import annotations

from tests.helpers.summaries import as_example, summary_encoder
from tests.helpers.tokenizers import SPACE, spaced_word_tokenizer


def test_one_space_is_before_the_summary() -> None:
    """The first word of the summary has the same token as elsewhere, with one space before it."""
    tokenizer = spaced_word_tokenizer()
    encoder = summary_encoder(tokenizer, 32, 4, ":")
    example = encoder.encode_example(as_example("a b", "b a"))
    tokens = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert tokens == [f"{SPACE}a", f"{SPACE}b", f"{SPACE}:", f"{SPACE}b", f"{SPACE}a", "<e>"]
    assert encoder.decode(example["input_ids"][slice(*example["label_spans"])]) == "b a"
