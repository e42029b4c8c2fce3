"""From an article and its summary to token ids.

A sequence is ``[start] article separator summary end``. The separator and ``" " + summary`` are encoded apart, so that
the prompt of a generation is tokenised exactly as in training: with a byte-level BPE the space is the next word's.
(A SentencePiece tokenizer adds that space itself.)
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peftbench.common.filesystem import write_error
from peftbench.data.sources import dataset_cache_dir
from peftbench.errors import OutOfRangeError, SequenceTooShortError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_CACHE_VERSION = 2  # part of the cache's key: raise it when encoding changes


@dataclass(frozen=True)
class SequenceLayout:
    """How long a sequence may be and what stands between its parts."""

    max_length: int
    """Longest sequence in real tokens."""
    separator: str
    max_new_tokens: int
    """Room kept for the summary when a prompt is made for generation, in tokens."""

    @classmethod
    def for_model(
        cls,
        *,
        separator: str,
        max_length: int | None,
        max_new_tokens: int,
        max_positions: int | None,
        virtual_tokens: int,
    ) -> SequenceLayout:
        """The layout for a model with ``positions`` positions, of which a method takes ``virtual_tokens``.

        Raises:
            OutOfRangeError: real and virtual tokens together exceed the model's positions.
        """
        room = None if max_positions is None else max_positions - virtual_tokens
        if max_length is None and room is None:
            raise OutOfRangeError("the model's config gives no number of positions; set data.max_length")
        longest = room if max_length is None else max_length
        assert longest is not None
        if room is not None and room <= max_new_tokens:
            raise OutOfRangeError(
                f"{virtual_tokens} virtual tokens leave {max(room, 0)} of the model's {max_positions} positions, and "
                f"evaluate.max_new_tokens={max_new_tokens} needs more; use fewer virtual tokens"
            )
        if room is not None and longest > room:
            raise OutOfRangeError(
                f"data.max_length={longest} and {virtual_tokens} virtual tokens exceed the model's {max_positions} "
                f"positions; set data.max_length={room} or less, in every run that is to be compared"
            )
        if max_new_tokens >= longest:
            raise SequenceTooShortError(
                f"evaluate.max_new_tokens={max_new_tokens} leaves no room for an article in {longest} tokens; "
                f"lower it, or raise data.max_length"
            )
        return cls(longest, separator, max_new_tokens)


class Encoder:
    """Encodes examples with one tokenizer under one layout."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, layout: SequenceLayout) -> None:
        self.tokenizer = tokenizer
        self.layout = layout
        self.eos_token_id = _require_eos_token_id(tokenizer)
        self.prefix_ids = self._find_prefix_ids()
        self.separator_ids = self._tokenize(layout.separator)
        # With a byte-level BPE the space before a word is part of its token; SentencePiece puts one there by itself.
        self._summary_prefix = (
            "" if str(tokenizer.convert_ids_to_tokens(self._tokenize("a"))[0]).startswith("\u2581") else " "
        )
        taken = len(self.prefix_ids) + len(self.separator_ids)
        if layout.max_new_tokens + taken >= layout.max_length:
            raise SequenceTooShortError(
                f"evaluate.max_new_tokens={layout.max_new_tokens} and {taken} tokens of separator leave no room "
                f"for an article in {layout.max_length} tokens; lower it, or raise data.max_length"
            )

    def _find_prefix_ids(self) -> list[int]:
        """What the tokenizer puts before every text of its own accord: a start token for Llama, nothing for GPT-2."""
        # By position, not by id: a start token may be the end token as well, as in OPT.
        whole, text = self.tokenizer("a", verbose=False)["input_ids"], self._tokenize("a")
        places = (place for place in range(len(whole)) if whole[place : place + len(text)] == text)
        return list(whole[: next(places, 0)])

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def encode_prompt(self, article: str, reserved_tokens: int | None = None) -> list[int]:
        """Start, article and separator, leaving ``room`` tokens (by default ``layout.new_tokens``) for a summary."""
        reserved_tokens = self.layout.max_new_tokens if reserved_tokens is None else reserved_tokens
        return self._build_prompt(self._tokenize(article), reserved_tokens)

    def _build_prompt(self, article_ids: list[int], reserved_tokens: int) -> list[int]:
        space = max(0, self.layout.max_length - reserved_tokens - len(self.prefix_ids) - len(self.separator_ids))
        return [*self.prefix_ids, *article_ids[:space], *self.separator_ids]

    def encode_example(self, article: str, summary: str) -> dict[str, Any]:
        """``input_ids`` of the whole sequence and ``prompt_tokens``, the number before the first labelled one.

        Only the article is ever shortened. ``needed`` is what the sequence would take with one token of article.
        """
        target = [*self._tokenize(self._summary_prefix + summary.strip()), self.eos_token_id]
        prompt = self._build_prompt(self._tokenize(article), len(target))
        needed = len(self.prefix_ids) + 1 + len(self.separator_ids) + len(target)
        return {"input_ids": [*prompt, *target], "prompt_tokens": len(prompt), "needed": needed}

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids`` up to the first end token."""
        ids = ids[: ids.index(self.eos_token_id)] if self.eos_token_id in ids else ids
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def encode_split(self, dataset: Dataset, split: str, overlong: str) -> tuple[Dataset, int]:
        """Encode a whole split, cached and with a progress bar; returns it and the number of examples dropped.

        Raises:
            SequenceTooShortError: an example leaves no room for its article and ``too_long`` is not "drop".
        """
        # Tokenizers do not hash alike from one process to the next, so the cache is keyed by what they do.
        key = json.dumps(
            [
                _CACHE_VERSION,
                dataset._fingerprint,
                asdict(self.layout),
                self.eos_token_id,
                self.prefix_ids,
                hash_tokenizer(self.tokenizer),
            ]
        )
        try:
            encoded = dataset.map(
                lambda row: self.encode_example(row["article"], row["summary"]),
                desc=f"encoding {split}",
                new_fingerprint=hashlib.blake2b(key.encode(), digest_size=16).hexdigest(),
            )
        except OSError as error:
            raise write_error(dataset_cache_dir(dataset), error) from error
        longest = self.layout.max_length
        fits = [index for index, needed in enumerate(encoded["needed"]) if needed <= longest]
        if len(fits) < len(encoded) and (overlong != "drop" or not fits):
            worst = max(range(len(encoded)), key=lambda index: encoded[index]["needed"])
            row = encoded[worst]
            raise SequenceTooShortError(
                f"{len(encoded) - len(fits)} of {len(encoded)} examples of the {split} split do not fit {longest} "
                f"tokens with separator, summary and end token ({row['id']} needs {row['needed']}); "
                "raise data.max_length" + (", or set data.overlong=drop" if overlong != "drop" else "")
            )
        return (encoded if len(fits) == len(encoded) else encoded.select(fits)), len(encoded) - len(fits)


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what a tokenizer does: its vocabulary, merges, normalisation and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.blake2b((state + str(tokenizer.special_tokens_map)).encode(), digest_size=16).hexdigest()


def _require_eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if end is None:
        raise OutOfRangeError(f"the tokenizer {tokenizer.name_or_path!r} has no end token; use one that has")
    return int(end)
