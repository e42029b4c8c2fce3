"""Small tokenizers whose ids and tokens can be listed by hand."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

from peftbench.data.encode import iter_spans

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

END = "<e>"
UNKNOWN = "<u>"
SPACE = "\u2581"


def word_tokenizer(
    start: str | None = None, end: str = "<e>", append_end: bool = False, first_word: str = "a"
) -> PreTrainedTokenizerBase:
    """Return a tokenizer of whole words that adds ``start`` before a text and, with ``append_end``, ``end`` after it.

    ``first_word`` has the id 3.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = [UNKNOWN, "<e>", "<s>", first_word, "bb", "cc", "=", ">"]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    template = f"{start + ' ' if start else ''}$A{' ' + end if append_end else ''}"
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=template, special_tokens=[(token, vocabulary.index(token)) for token in ("<s>", "<e>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, unk_token=UNKNOWN)


def spaced_word_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of the tokens a, b and : that adds a space before every text, as SentencePiece does."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [UNKNOWN, END, SPACE, f"{SPACE}a", f"{SPACE}b", "a", "b", ":", f"{SPACE}:"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = _add_spaces(Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN)))
    backend.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, unk_token=UNKNOWN)


def spaced_bpe_tokenizer() -> PreTrainedTokenizerBase:
    """Return a BPE tokenizer with bytes for unknown characters and a start token, like the one of Llama 2."""
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    unknown, start, end = specials = ["<unk>", "<s>", "</s>"]
    merges = [(SPACE, "a"), (SPACE, "b"), ("a", "b"), (f"{SPACE}a", "b"), ("T", "L"), (SPACE, "TL")]
    pieces = [
        *specials,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *dict.fromkeys([SPACE, *"abTLDR:;.=", *("".join(pair) for pair in merges)]),
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = _add_spaces(Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True)))
    backend.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=start, eos_token=end, unk_token=unknown)


def character_tokenizer(
    *special_tokens: str, start: str | None = None, template: str | None = None
) -> PreTrainedTokenizerBase:
    """Return a tokenizer of ASCII characters with the end token ``<e>`` and special tokens; it adds ``start``."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    specials = list(dict.fromkeys([END, *([start] if start else []), *special_tokens]))
    vocabulary = {token: index for index, token in enumerate([*specials, *string.printable])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.Fuse()
    if start is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, vocabulary[start])]
        )
    names = {"bos_token": start} if start is not None else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, additional_special_tokens=list(special_tokens), **names
    )
    tokenizer.chat_template = template
    return tokenizer


def list_labels(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> str:
    """Return the tokens of an encoded example: labels in brackets, a special token by its name in braces."""
    shown, position = "", 0
    for start, end in iter_spans(row["label_spans"]):
        shown += list_tokens(tokenizer, row["input_ids"][position:start])
        shown += f"[{list_tokens(tokenizer, row['input_ids'][start:end])}]"
        position = end
    return shown + list_tokens(tokenizer, row["input_ids"][position:])


def list_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the tokens of a character tokenizer, a special token by its name in braces."""
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    return "".join(
        "{" + token.strip("<|>") + "}" if id in special else token for id, token in zip(ids, tokens, strict=True)
    )


def _add_spaces(backend: Any) -> Any:
    from tokenizers import decoders, normalizers

    # Like Llama's: a space is always added before the text, so a space in the text itself would be a second one.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend
