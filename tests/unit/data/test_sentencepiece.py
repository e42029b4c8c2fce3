"""Tokenizers that put a space before every text by themselves, as SentencePiece does."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peftbench.data.encode import Encoder, SequenceLayout

SPACE = "\u2581"


def test_no_second_space_before_the_summary() -> None:
    """The summary's first word is the token that it is anywhere else, with one space before it."""
    special = {"eos_token": "<e>", "unk_token": "<u>"}
    pieces = ["<u>", "<e>", SPACE, f"{SPACE}a", f"{SPACE}b", "a", "b", ":", f"{SPACE}:"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    # As Llama's: a space is put before the text whatever it begins with, so that one given too would be a second.
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    inner.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    inner.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    encoder = Encoder(tokenizer, SequenceLayout(32, ":", 4))
    example = encoder.encode_example("a b", "b a")
    said = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert said == [f"{SPACE}a", f"{SPACE}b", f"{SPACE}:", f"{SPACE}b", f"{SPACE}a", "<e>"]
    assert encoder.decode(example["input_ids"][example["prompt_tokens"] :]) == "b a"
