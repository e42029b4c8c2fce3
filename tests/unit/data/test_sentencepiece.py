"""Tokenizers that add a space before every text, as SentencePiece does."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peftbench.data.encode import Encoder, SequenceLayout

SPACE = "\u2581"


def test_one_space_is_before_the_summary() -> None:
    """The first word of the summary has the same token as elsewhere, with one space before it."""
    special = {"eos_token": "<e>", "unk_token": "<u>"}
    pieces = ["<u>", "<e>", SPACE, f"{SPACE}a", f"{SPACE}b", "a", "b", ":", f"{SPACE}:"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    # Like Llama's: a space is always added before the text, so a space in the text itself would be a second one.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    encoder = Encoder(tokenizer, SequenceLayout(32, ":", 4))
    example = encoder.encode_example("a b", "b a")
    tokens = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert tokens == [f"{SPACE}a", f"{SPACE}b", f"{SPACE}:", f"{SPACE}b", f"{SPACE}a", "<e>"]
    assert encoder.decode(example["input_ids"][example["prompt_tokens"] :]) == "b a"
