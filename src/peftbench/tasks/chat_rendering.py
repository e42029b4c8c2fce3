"""Render conversations with a chat template, and find the text of the turns to label.

The labels come from the template itself: from its ``{% generation %}`` blocks if it has some, else from what it adds to
the generation prompt for each assistant turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from peftbench.common.text import first_line
from peftbench.data.readers.rows import Example
from peftbench.data.segments import RenderError, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LabeledTurns = Literal["assistant", "last_assistant", "all"]
Message = dict[str, Any]
Span = tuple[int, int]

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FIRST_MARK = 0xF0000
"""First of the private characters that stand for special tokens in a message's text while the template renders it."""


class ChatRenderer:
    """Renders conversations as segments."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, labels: LabeledTurns) -> None:
        """Take over the special tokens of the tokenizer, which the template may write."""
        self._template, self._labels = template, labels
        self._variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special_tokens = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, self._special_tokens)) or "(?!)")
        marks = {token: chr(_FIRST_MARK + index) for index, token in enumerate(self._special_tokens)}
        self._marks, self._tokens = marks, {mark: token for token, mark in marks.items()}
        self._mark = re.compile("[" + "".join(self._tokens) + "]" if self._tokens else "(?!)")
        self._has_generation_block = _GENERATION_BLOCK.search(template) is not None

    def iter_variants(self, example: Example) -> Iterator[Sequence[Segment]]:
        """Yield the conversation, then the same without its first turns, up to the last question and answer."""
        messages = [self._escape(message) for message in json.loads(example["messages"])]
        num_leading = next((index for index, one in enumerate(messages) if one["role"] in {"user", "assistant"}), 0)
        starts = [index for index, one in enumerate(messages) if one["role"] == "user" and index > num_leading]
        for start in [num_leading, *starts]:
            yield self._render_segments([*messages[:num_leading], *messages[start:]])

    def _escape(self, message: Message) -> Message:
        """Return a message whose texts have no special token, so that the template alone writes them."""
        return {name: self._mark_specials(value) for name, value in message.items() if value is not None}

    def _mark_specials(self, value: Any) -> Any:  # noqa: ANN401 — any value of JSON
        if isinstance(value, str):
            return self._special.sub(lambda match: self._marks[match.group()], value)
        if isinstance(value, list):
            return [self._mark_specials(one) for one in value]
        if isinstance(value, dict):
            return {self._mark_specials(name): self._mark_specials(one) for name, one in value.items()}
        return value

    def _render_segments(self, messages: list[Message]) -> Sequence[Segment]:
        text, spans = self._render_labeled(messages)
        segments: list[Segment] = []
        position = 0
        for start, end in spans:
            segments += self._split(text[position:start], is_label=False)
            segments += self._split(text[start:end], is_label=True)
            position = end
        return [*segments, *self._split(text[position:], is_label=False)]

    def _split(self, text: str, *, is_label: bool) -> Iterator[Segment]:
        """Yield a part of the rendered text; special tokens that a message's text spells are segments of their own."""
        position = 0
        for match in self._mark.finditer(text):
            if before := text[position : match.start()]:
                yield Segment(before, is_label, is_template=True, is_continuation=True)
            yield Segment(self._tokens[match.group()], is_label, is_continuation=True)
            position = match.end()
        if rest := text[position:]:
            yield Segment(rest, is_label, is_template=True, is_continuation=True)

    def _render_labeled(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """Return the rendered conversation and the labeled parts of it."""
        if self._labels == "all":
            text = self._render(messages)
            return text, [(0, len(text))]
        if self._has_generation_block:
            text, spans = self._render_with_generation_blocks(messages)
        else:
            text = self._render(messages)
            indices = [index for index, message in enumerate(messages) if _is_labeled(message)]
            spans = [self._find_turn(messages, index, text) for index in indices[-1:] if self._labels != "assistant"]
            spans = spans or [self._find_turn(messages, index, text) for index in indices]
        if self._labels == "last_assistant":
            spans = spans[-1:]
        if not spans or not any(text[start:end].strip() for start, end in spans):
            raise RenderError(
                "has no labeled token: the chat template marks no text of the assistant",
                "set task.chat_template to another template",
            )
        return text, spans

    def _render_with_generation_blocks(self, messages: list[Message]) -> tuple[str, list[Span]]:
        text, spans = self._call_template(messages, return_assistant_tokens_mask=True)
        self._check_prompt(messages, text, spans)
        if not any(text[start:end].strip() for start, end in spans):
            return text, []
        turns = [message for message in messages if message["role"] == "assistant"]
        if len(turns) == len(spans):
            spans = [span for span, message in zip(spans, turns, strict=True) if _is_labeled(message)]
        return text, [(start, self._find_end(text, end)) for start, end in spans]

    def _find_end(self, text: str, end: int) -> int:
        """Return the end of a turn with the special token that follows it, which ends the turn in generation too."""
        if next((match for match in self._special.finditer(text[:end]) if match.end() == end), None) is not None:
            return end
        following = self._special.match(text, end)
        if following is None:
            raise self._has_no_end()
        return following.end()

    def _check_prompt(self, messages: list[Message], text: str, spans: list[Span]) -> None:
        """Check that the last labeled part follows exactly on the prompt of a generation."""
        prompt = self._render(messages[:-1], add_generation_prompt=True)
        if spans and not (text.startswith(prompt) and spans[-1][0] == len(prompt)):
            raise self._differs(len(messages))

    def _find_turn(self, messages: list[Message], index: int, text: str) -> Span:
        """Return where the template writes an assistant turn: from the end of the prompt to the turn's last token."""
        prompt = self._render(messages[:index], add_generation_prompt=True)
        turn = text if index == len(messages) - 1 else self._render(messages[: index + 1])
        if not (turn.startswith(prompt) and text.startswith(turn)):
            raise self._differs(index + 1)
        # What follows the turn's last special token, e.g. a line break, is written by the template, never generated.
        specials = [match.end() for match in self._special.finditer(turn, len(prompt))]
        if not specials:
            raise self._has_no_end()
        return len(prompt), specials[-1]

    def _has_no_end(self) -> RenderError:
        return RenderError(
            "has an assistant turn without an end: the chat template writes no special token after it",
            "set task.chat_template=plain, or write {{ eos_token }} after the assistant's messages in your template",
        )

    def _differs(self, number: int) -> RenderError:
        advice = "set task.chat_template to another template"
        if self._labels == "assistant" and not self._has_generation_block:
            advice = "set task.labels=last_assistant, or " + advice
        return RenderError(
            f"is rendered differently in training and generation: the chat template does not write message {number} "
            "after the generation prompt",
            advice,
        )

    def _render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        return self._call_template(messages, add_generation_prompt=add_generation_prompt)[0]

    def _call_template(self, messages: list[Message], **options: bool) -> tuple[str, list[Span]]:
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # declared to return a str, which it does not
        try:
            rendered, spans = render([messages], chat_template=self._template, **options, **self._variables)
        except Exception as error:  # a template is a program, which can fail in any way
            raise RenderError(
                f"cannot be rendered by the chat template: {first_line(error, max_length=200).rstrip('.')}",
                "correct the conversation, or set task.chat_template to another template",
            ) from error
        return rendered[0], [(start, end) for start, end in spans[0]] if spans else []


def _is_labeled(message: Message) -> bool:
    """True for an assistant turn, unless its ``weight`` (as in OpenAI's format) is 0."""
    return message["role"] == "assistant" and message.get("weight") != 0
