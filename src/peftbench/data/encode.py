"""Encode an article and its summary as token ids.

A sequence is ``[start] article separator summary end``. The separator and ``" " + summary`` are encoded separately, so
that the prompt of a generation is tokenized exactly as in training: byte-level BPE puts the space into the next word's
token. (A SentencePiece tokenizer adds that space itself.)
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from peftbench.data.example_cache import cache_error, dataset_cache_dir
from peftbench.errors import OutOfRangeError, SequenceTooShortError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_CACHE_VERSION = 3  # part of the cache's key: increase it when encoding changes


@dataclass(frozen=True)
class SequenceLayout:
    """Length limit of a sequence, and the separator between its parts."""

    max_length: int
    """Longest sequence in real tokens."""
    separator: str
    max_new_tokens: int
    """Tokens reserved for the summary in a generation prompt."""

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
        """Return the layout for a model with ``max_positions`` positions and a method with ``virtual_tokens``.

        Raises:
            OutOfRangeError: real and virtual tokens together exceed the model's positions.
        """
        room = None if max_positions is None else max_positions - virtual_tokens
        if max_length is None and room is None:
            raise OutOfRangeError("the model's config has no number of positions; set data.max_length")
        longest = room if max_length is None else max_length
        assert longest is not None
        if max_positions is not None and max_positions <= max_new_tokens:
            raise OutOfRangeError(
                f"evaluate.max_new_tokens={max_new_tokens} leaves no room for the input in the model's {max_positions} "
                f"positions; lower evaluate.max_new_tokens"
            )
        if room is not None and room <= max_new_tokens:
            raise OutOfRangeError(
                f"{virtual_tokens} virtual tokens leave {max(room, 0)} of the model's {max_positions} positions, and "
                f"evaluate.max_new_tokens={max_new_tokens} needs more; use fewer virtual tokens, or lower "
                "evaluate.max_new_tokens"
            )
        if room is not None and longest > room:
            raise OutOfRangeError(
                f"data.max_length={longest} and {virtual_tokens} virtual tokens exceed the model's {max_positions} "
                f"positions; set data.max_length={room} or less, in every run of the comparison"
            )
        if max_new_tokens >= longest:
            raise SequenceTooShortError(
                f"data.max_length={longest} is too short: evaluate.max_new_tokens={max_new_tokens} leaves no room for "
                "the input; raise data.max_length or lower evaluate.max_new_tokens"
            )
        return cls(longest, separator, max_new_tokens)


class Encoder:
    """Encodes examples with one tokenizer under one layout."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, layout: SequenceLayout) -> None:
        self.tokenizer = tokenizer
        self.layout = layout
        self.eos_token_id = _require_eos_token_id(tokenizer)
        unknown = {tokenizer.unk_token_id} - {self.eos_token_id}  # of text that the vocabulary lacks
        self._control_ids = frozenset(tokenizer.all_special_ids) - unknown
        self.prefix_ids = self._find_prefix_ids()
        self.separator_ids = self._tokenize(layout.separator)
        # In byte-level BPE a leading space is part of the token; SentencePiece adds the space itself.
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
        """Return the ids that the tokenizer adds before every text: a start token for Llama, none for GPT-2."""
        # Found by position, not by id: in some models (OPT) the start token is also the end token.
        with_special, text = self.tokenizer("a", verbose=False)["input_ids"], self._tokenize("a")
        starts = (start for start in range(len(with_special)) if with_special[start : start + len(text)] == text)
        return list(with_special[: next(starts, 0)])

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _tokenize_text(self, text: str) -> list[int]:
        """Encode text of an example, in which the name of a control token, e.g. ``</s>``, is text too."""
        tokenize = self.tokenizer
        ids: list[int] = tokenize(text, add_special_tokens=False, verbose=False, split_special_tokens=True)["input_ids"]
        return ids

    def _count_control_tokens(self, ids: list[int]) -> int:
        return sum(id in self._control_ids for id in ids)

    def encode_prompt(self, article: str, reserved_tokens: int | None = None) -> list[int]:
        """Encode start, article and separator; reserve tokens for a summary (default: ``layout.max_new_tokens``)."""
        reserved_tokens = self.layout.max_new_tokens if reserved_tokens is None else reserved_tokens
        return self._build_prompt(self._tokenize_text(article), reserved_tokens)

    def _build_prompt(self, article_ids: list[int], reserved_tokens: int) -> list[int]:
        space = max(0, self.layout.max_length - reserved_tokens - len(self.prefix_ids) - len(self.separator_ids))
        return [*self.prefix_ids, *article_ids[:space], *self.separator_ids]

    def encode_example(self, article: str, summary: str) -> dict[str, Any]:
        """Return ``input_ids`` of the full sequence and ``prompt_tokens``, the number of tokens before the first label.

        Only the article is truncated. ``needed`` is the length of the sequence with one token of article,
        ``cut_tokens`` is the number of tokens cut from the article, and ``control_tokens`` the number of control tokens
        that the tokenizer made of text.
        """
        summary_ids = self._tokenize_text(self._summary_prefix + summary.strip())
        article_ids = self._tokenize_text(article)
        target = [*summary_ids, self.eos_token_id]
        prompt = self._build_prompt(article_ids, len(target))
        other_tokens = len(self.prefix_ids) + len(self.separator_ids)
        return {
            "input_ids": [*prompt, *target],
            "prompt_tokens": len(prompt),
            "needed": other_tokens + 1 + len(target),
            "cut_tokens": len(article_ids) - (len(prompt) - other_tokens),
            "control_tokens": self._count_control_tokens(article_ids) + self._count_control_tokens(summary_ids),
        }

    def decode(self, ids: list[int]) -> str:
        """Decode ``ids`` up to the first end token."""
        ids = ids[: ids.index(self.eos_token_id)] if self.eos_token_id in ids else ids
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def encode_split(self, dataset: Dataset, split: str, overlong: str) -> tuple[Dataset, int]:
        """Encode a split, cached and with a progress bar; return it and the number of dropped examples.

        Raises:
            SequenceTooShortError: an example leaves no room for its article and ``overlong`` is not "drop".
        """
        # A tokenizer's own hash differs between processes, so the cache key is built from its behavior.
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
            raise cache_error(dataset_cache_dir(dataset), error) from error
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


def count_marked(dataset: Dataset, column: str) -> int:
    """Return the number of examples with a value above 0 in a column of :meth:`Encoder.encode_example`."""
    return sum(value > 0 for value in dataset[column])


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's vocabulary, merges, normalization and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.blake2b((state + str(tokenizer.special_tokens_map)).encode(), digest_size=16).hexdigest()


def _require_eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if end is None:
        raise OutOfRangeError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token; use a tokenizer that has one"
        )
    return int(end)
