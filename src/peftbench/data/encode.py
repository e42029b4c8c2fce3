"""Encode examples as token ids and spans of labels.

A task gives an example's segments; each is tokenized on its own, so that the prompt of a generation has the tokens that
it has in training. Only a prompt is ever cut to the length, unless the task allows more.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from peftbench.data.example_cache import cache_error, dataset_cache_dir
from peftbench.data.segments import RenderError, Segment
from peftbench.errors import DataError, OutOfRangeError, SequenceTooShortError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from peftbench.data.readers.rows import Example
    from peftbench.data.segments import RenderingTask

_CACHE_VERSION = 5  # part of the cache's key: increase it when encoding changes
_BATCH_ROWS = 1000
ENCODED_COLUMNS = ("input_ids", "label_spans", "needed", "prompt_needed", "cut_tokens", "cut_labels", "control_tokens")


@dataclass(frozen=True)
class SequenceLayout:
    """Length limit of a sequence."""

    max_length: int
    """Longest sequence in real tokens."""
    max_new_tokens: int
    """Tokens reserved for generated text after a prompt; 0 if nothing is generated."""

    @classmethod
    def for_model(
        cls, *, max_length: int | None, max_new_tokens: int, max_positions: int | None, virtual_tokens: int
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
        return cls(longest, max_new_tokens)


class TokenizedSegment(NamedTuple):
    """A segment and its token ids."""

    segment: Segment
    ids: list[int]


class Tokenizer:
    """Tokenizes segments."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find out whether the tokenizer adds spaces (SentencePiece) and which ids are control tokens."""
        self.tokenizer = tokenizer
        self.eos_token_id = _require_eos_token_id(tokenizer)
        unknown = {tokenizer.unk_token_id} - {self.eos_token_id}  # of text that the vocabulary lacks
        self.control_ids = frozenset(tokenizer.all_special_ids) - unknown
        # In byte-level BPE a leading space is part of the token; SentencePiece adds the space itself.
        self._adds_space = str(tokenizer.convert_ids_to_tokens(self._call(["a"])[0])[0]).startswith("\u2581")
        self._line_break = self._call(["\n"])[0] if self._adds_space else []

    def tokenize(self, segments: Iterable[Segment]) -> list[TokenizedSegment]:
        """Tokenize segments, those of one kind together."""
        ordered = list(segments)
        ids: dict[tuple[bool, str], list[int]] = {}
        for is_template in (False, True):
            texts = {self._prepare(one) for one in ordered if one.text and one.is_template == is_template}
            if texts:
                listed = sorted(texts)
                ids |= zip(((is_template, text) for text in listed), self._call(listed, is_template), strict=True)
        return [TokenizedSegment(one, self._find(one, ids)) for one in ordered]

    def _prepare(self, segment: Segment) -> str:
        """Return the text to tokenize: a continuation gets the space that SentencePiece would add, or a line break."""
        if not (self._adds_space and segment.is_continuation):
            return segment.text
        return segment.text[1:] if segment.text.startswith(" ") else "\n" + segment.text

    def _find(self, segment: Segment, ids: Mapping[tuple[bool, str], list[int]]) -> list[int]:
        if not segment.text:
            return list(segment.ids)
        found = ids[segment.is_template, self._prepare(segment)]
        if self._adds_space and segment.is_continuation and not segment.text.startswith(" "):
            return found[len(self._line_break) :]
        return found

    def _call(self, texts: Sequence[str], is_template: bool = False) -> list[list[int]]:
        """Tokenize texts; unless ``is_template``, the name of a control token, e.g. ``</s>``, is text too."""
        options = {} if is_template else {"split_special_tokens": True}
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False, **options)
        return list(encoded["input_ids"])


class Encoder:
    """Encodes examples with one tokenizer under one layout."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, layout: SequenceLayout, task: RenderingTask) -> None:
        """Prepare the encoder.

        Raises:
            PeftbenchError: the tokenizer lacks what the task needs.
        """
        self.tokenizer, self.layout, self.task = tokenizer, layout, task
        self.renderer = task.build_renderer(tokenizer)
        reference_task = task.label_reference()
        self._prompt_renderer = self.renderer if reference_task is task else reference_task.build_renderer(tokenizer)
        self._segments = Tokenizer(tokenizer)
        self.eos_token_id = self._segments.eos_token_id

    def encode_prompt(self, example: Example) -> list[int]:
        """Return the tokens before the reference; ``layout.max_new_tokens`` more fit the sequence.

        Raises:
            DataError: the example cannot be rendered.
            SequenceTooShortError: what must not be cut from the prompt is too long.
        """
        cut = _cut(self._find_prompt(example), self._max_prompt_length)
        if cut is None:
            raise SequenceTooShortError(
                f"the prompt of example {example['id']} leaves no room for evaluate.max_new_tokens="
                f"{self.layout.max_new_tokens} in {self.layout.max_length} tokens",
                "lower it, or raise data.max_length",
            )
        return [id for part in cut for id in part.ids]

    @property
    def _max_prompt_length(self) -> int:
        return self.layout.max_length - self.layout.max_new_tokens

    def _find_prompt(self, example: Example) -> list[TokenizedSegment]:
        """Return the longest prompt that fits without being cut, else the shortest."""
        prompt: list[TokenizedSegment] = []
        variants = self._prompt_renderer.iter_variants(example)
        while segments := self._render(example, variants):
            prompt = self._segments.tokenize(segments)[: _find_last_labels(segments)]
            if sum(len(part.ids) for part in prompt) <= self._max_prompt_length:
                break
        return prompt

    def encode_choices(self, example: Example) -> list[dict[str, Any]]:
        """Return ``input_ids`` and ``label_spans`` of the prompt with each of its choices, without an end token.

        Raises:
            SequenceTooShortError: one is too long, even if its prompt is cut.
        """
        rows = []
        for segments in self.task.render_choices(example, self.tokenizer):
            tokenized = self._segments.tokenize(segments)
            cut = _cut(tokenized, self.layout.max_length)
            if cut is None:
                raise SequenceTooShortError(
                    f"example {example['id']} with one of its choices does not fit {self.layout.max_length} tokens",
                    "raise data.max_length",
                )
            rows.append(_assemble(cut, tokenized, self._segments.control_ids))
        return rows

    def find_stop_ids(self, example: Example) -> list[int]:
        """Return the ids that end a generated text: the end token, and the special token that ends a labeled turn."""
        segments = self._render(example, self._prompt_renderer.iter_variants(example))
        labels = [id for segment, ids in self._segments.tokenize(segments) if segment.is_label for id in ids]
        return sorted({self.eos_token_id, *(self._segments.control_ids & set(labels[-1:]))})

    def measure_reference(self, example: Example) -> tuple[int, int]:
        """Return the number of tokens of the reference, and of those after it that the template writes."""
        segments = self._render(example, self._prompt_renderer.iter_variants(example))
        parts = self._segments.tokenize(segments)[_find_last_labels(segments) :]
        reference = list(itertools.takewhile(lambda part: part.segment.is_label, parts))
        return sum(len(part.ids) for part in reference), sum(len(part.ids) for part in parts[len(reference) :])

    def encode_example(self, example: Example) -> dict[str, Any]:
        """Return the columns ``ENCODED_COLUMNS`` of one example; see :meth:`encode_batch`."""
        return self.encode_batch([example])[0]

    def tokenize_whole(self, example: Example) -> list[int]:
        """Return the tokens of an example before anything is cut.

        Raises:
            DataError: the example cannot be rendered.
        """
        segments = self._render(example, self.renderer.iter_variants(example))
        return [id for part in self._segments.tokenize(segments) for id in part.ids]

    def encode_batch(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Return ``input_ids`` and ``label_spans`` (start, end, start, end, ...) of each example, and counts.

        ``needed`` and ``prompt_needed`` are the lengths of the shortest sequence and prompt to which the example may be
        cut; ``cut_tokens`` and ``cut_labels`` are the numbers of tokens and of labels that are cut, and
        ``control_tokens`` the number of control tokens that the tokenizer made of text. An example that does not fit is
        not cut.

        Raises:
            DataError: an example cannot be rendered.
        """
        variants = [self.renderer.iter_variants(example) for example in examples]
        first = [self._render(example, iter(variant)) for example, variant in zip(examples, variants, strict=True)]
        tokenized = iter(self._segments.tokenize(segment for segments in first for segment in segments))
        encoded = []
        for example, segments, rest in zip(examples, first, variants, strict=True):
            whole = shortest = [next(tokenized) for _ in segments]
            while sum(len(part.ids) for part in shortest) > self.layout.max_length:
                following = self._render(example, rest)
                if not following:
                    break
                shortest = self._segments.tokenize(following)
            encoded.append(self._cut_example(example, whole, shortest))
        return encoded

    def _render(self, example: Example, variants: Any) -> Sequence[Segment]:  # noqa: ANN401 — an iterator
        try:
            return next(variants, ())  # type: ignore[no-any-return]
        except RenderError as error:
            raise DataError(f"example {example['id']} {error.content}", error.advice) from error

    def _cut_example(
        self, example: Example, whole: list[TokenizedSegment], shortest: list[TokenizedSegment]
    ) -> dict[str, Any]:
        cut = _cut(shortest, self.layout.max_length)
        row = _assemble(shortest if cut is None else cut, whole, self._segments.control_ids)
        prompt = shortest[: _find_last_labels([part.segment for part in shortest])]
        if self._prompt_renderer is not self.renderer or _count_needed(prompt) > self._max_prompt_length:
            prompt = self._find_prompt(example)
        choices = self.task.render_choices(example, self.tokenizer)
        shortest_choices = (_count_needed(self._segments.tokenize(segments)) for segments in choices)
        row |= {
            "needed": _count_needed(shortest),
            "prompt_needed": max(shortest_choices, default=_count_needed(prompt)),
        }
        ids, bos = row["input_ids"], self.tokenizer.bos_token_id
        if bos is not None and bos != self.eos_token_id and list(ids[:2]) == [bos, bos]:
            raise DataError(
                f"example {example['id']} starts with two {self.tokenizer.bos_token!r} tokens",
                "remove one of them from the chat template",
            )
        if not any(end > max(start, 1) for start, end in iter_spans(row["label_spans"])):
            raise DataError(f"example {example['id']} has no labeled token", "remove it")
        return row

    def decode(self, ids: list[int], stop_ids: Sequence[int] = ()) -> str:
        """Decode ``ids`` up to the first end token or one of ``stop_ids``."""
        ends = {self.eos_token_id, *stop_ids}
        ids = list(itertools.takewhile(lambda id: id not in ends, ids))
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def encode_split(
        self, dataset: Dataset, split: str, overlong: str, *, is_evaluated: bool = False
    ) -> tuple[Dataset, int]:
        """Encode a split, cached and with a progress bar; return it and the number of dropped examples.

        ``is_evaluated``: generated text must fit after each prompt too.

        Raises:
            DataError: an example cannot be rendered, or has no labels.
            SequenceTooShortError: an example does not fit and ``overlong`` is not "drop".
        """
        return self._drop_overlong(self.encode_all(dataset, split), split, overlong, is_evaluated=is_evaluated)

    def encode_all(self, dataset: Dataset, split: str) -> Dataset:
        """Add the columns ``ENCODED_COLUMNS`` to a split, cached and with a progress bar; drop nothing.

        Raises:
            DataError: an example cannot be rendered, or has no labels.
        """
        # A tokenizer's own hash differs between processes, so the cache key is built from its behavior.
        key = json.dumps(
            [
                _CACHE_VERSION,
                dataset._fingerprint,
                asdict(self.layout),
                self.task.model_dump_json(),
                self.eos_token_id,
                hash_tokenizer(self.tokenizer),
            ]
        )
        names = dataset.column_names

        def encode(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            rows = [
                dict(zip(names, cells, strict=True)) for cells in zip(*(columns[name] for name in names), strict=True)
            ]
            encoded = self.encode_batch(rows)
            return {name: [row[name] for row in encoded] for name in ENCODED_COLUMNS}

        try:
            return dataset.map(
                encode,
                batched=True,
                batch_size=_BATCH_ROWS,
                desc=f"encoding {split}",
                new_fingerprint=hashlib.blake2b(key.encode(), digest_size=16).hexdigest(),
            )
        except OSError as error:
            raise cache_error(dataset_cache_dir(dataset), error) from error

    def _drop_overlong(self, encoded: Dataset, split: str, overlong: str, *, is_evaluated: bool) -> tuple[Dataset, int]:
        longest, max_new_tokens = self.layout.max_length, self.layout.max_new_tokens
        needed_tokens = list(encoded["needed"])
        if is_evaluated:
            prompts = (prompt + max_new_tokens for prompt in encoded["prompt_needed"])
            needed_tokens = list(map(max, needed_tokens, prompts))
        fits = [index for index, needed in enumerate(needed_tokens) if needed <= longest]
        if len(fits) < len(encoded) and (overlong != "drop" or not fits):
            worst = max(range(len(encoded)), key=lambda index: needed_tokens[index])
            generated = f" with {max_new_tokens} generated ones" if is_evaluated and max_new_tokens else ""
            raise SequenceTooShortError(
                f"{len(encoded) - len(fits)} of {len(encoded)} examples of the {split} split do not fit {longest} "
                f"tokens{generated} even when cut (example {encoded[worst]['id']} needs "
                f"{needed_tokens[worst]})",
                "raise data.max_length" + (", or set data.overlong=drop" if overlong != "drop" else ""),
            )
        return (encoded if len(fits) == len(encoded) else encoded.select(fits)), len(encoded) - len(fits)


def iter_spans(flat: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Return the spans of a flat list start, end, start, end, ..."""
    return zip(flat[::2], flat[1::2], strict=True)


def count_labels(flat: Sequence[int]) -> int:
    """Return the number of labeled positions; a row's first token is never predicted."""
    return sum(max(0, end - max(start, 1)) for start, end in iter_spans(flat))


def _find_last_labels(segments: Sequence[Segment]) -> int:
    """Return the index at which the last group of labeled segments starts."""
    index = max((index for index, segment in enumerate(segments) if segment.is_label), default=len(segments) - 1)
    while index > 0 and segments[index - 1].is_label:
        index -= 1
    return index


def _cut(parts: Sequence[TokenizedSegment], max_length: int) -> list[TokenizedSegment] | None:
    """Return the segments within ``max_length`` tokens; None if those that must not be cut are too long.

    Each segment that may be cut keeps at least one token.
    """
    excess = sum(len(part.ids) for part in parts) - max_length
    cut = []
    for segment, ids in parts:
        num = 0 if segment.cut == "never" else max(0, min(excess, len(ids) - 1))
        excess -= num
        cut.append(TokenizedSegment(segment, ids[num:] if segment.cut == "start" else ids[: len(ids) - num]))
    return None if excess > 0 else cut


def _count_needed(parts: Sequence[TokenizedSegment]) -> int:
    """Return the tokens of the shortest sequence to which the segments can be cut."""
    return sum(len(ids) if segment.cut == "never" else min(1, len(ids)) for segment, ids in parts)


def _assemble(
    parts: Sequence[TokenizedSegment], whole: Sequence[TokenizedSegment], control_ids: frozenset[int]
) -> dict[str, Any]:
    """Return the columns of a sequence that was cut from ``whole``."""
    ids: list[int] = []
    spans: list[int] = []
    for segment, tokens in parts:
        if segment.is_label and tokens:
            if spans and spans[-1] == len(ids):
                spans[-1] += len(tokens)
            else:
                spans += [len(ids), len(ids) + len(tokens)]
        ids += tokens
    labels = sum(len(tokens) for segment, tokens in whole if segment.is_label)
    return {
        "input_ids": ids,
        "label_spans": spans,
        "cut_tokens": sum(len(tokens) for _, tokens in whole) - len(ids),
        "cut_labels": labels - sum(end - start for start, end in iter_spans(spans)),
        "control_tokens": sum(
            id in control_ids for segment, tokens in whole if segment.text and not segment.is_template for id in tokens
        ),
    }


def count_marked(dataset: Dataset, column: str) -> int:
    """Return the number of examples with a value above 0 in a column of :meth:`Encoder.encode_example`."""
    return sum(value > 0 for value in dataset[column])


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's vocabulary, merges, normalization, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    content = state + str(tokenizer.special_tokens_map) + str(tokenizer.chat_template)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _require_eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if end is None:
        raise OutOfRangeError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token; use a tokenizer that has one"
        )
    return int(end)
