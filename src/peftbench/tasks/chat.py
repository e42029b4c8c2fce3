"""Chat: conversations, rendered by a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftbench.common.schema import PathText
from peftbench.data.readers.rows import Example, RowFault, to_printable
from peftbench.data.segments import Renderer
from peftbench.errors import MissingFileError, UnsupportedModelError, did_you_mean
from peftbench.tasks.base import Task
from peftbench.tasks.chat_rendering import ChatRenderer, LabeledTurns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "developer", "user", "assistant", "tool")
TEMPLATE_DIR = Path(__file__).parent / "chat_templates"
_ADVICE = 'write a list of objects like {"role": "user", "content": "..."}'


class Chat(Task):
    """Conversations in OpenAI's format. A conversation that is too long loses its first turns; a system message stays.

    The last turn of the assistant is the reference of an evaluation, and everything before it the prompt.
    """

    metrics: ClassVar[tuple[str, ...]] = ("rouge",)
    headline_metric: ClassVar[str | None] = "rougeL"

    kind: Literal["chat"] = "chat"
    """Kind of task."""
    messages: str = "messages"
    """Column with the list of messages, each with role (system, user, assistant, tool) and content."""
    chat_template: PathText | None = None
    """Chat template: null for the tokenizer's own, chatml, plain, or the path of a Jinja file."""
    labels: LabeledTurns = "assistant"
    """Tokens in the loss: all assistant turns, the last one, or the whole text. A turn includes its end token."""

    @property
    def columns(self) -> Mapping[str, str]:
        return {"messages": self.messages}

    @property
    def structured_columns(self) -> frozenset[str]:
        return frozenset({"messages"})

    def check_example(self, example: Example) -> RowFault | None:
        fault = find_fault(json.loads(example["messages"]))
        return None if fault is None else RowFault(f"{fault[0]} in column {self.messages!r}", fault[1])

    def label_reference(self) -> Task:
        return self.model_copy(update={"labels": "last_assistant"}) if self.labels == "all" else self

    def build_renderer(self, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        return ChatRenderer(tokenizer, read_template(self.chat_template, tokenizer), self.labels)

    def find_chat_template(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        return None if self.chat_template is None else read_template(self.chat_template, tokenizer)

    def add_shots(self, example: Example, shots: Sequence[Example]) -> Example:
        messages = json.loads(example["messages"])
        num_leading = next((index for index, one in enumerate(messages) if one["role"] in {"user", "assistant"}), 0)
        given = (one for shot in shots for one in json.loads(shot["messages"]) if one["role"] != "system")
        solved = [one | {"weight": 0} if one["role"] == "assistant" else one for one in given]
        return {**example, "messages": json.dumps([*messages[:num_leading], *solved, *messages[num_leading:]])}

    def get_prompt(self, example: Example) -> str:
        messages = json.loads(example["messages"])
        return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in messages[:-1])

    def get_reference(self, example: Example) -> str:
        return str(json.loads(example["messages"])[-1]["content"])


def find_fault(messages: Any) -> tuple[str, str] | None:  # noqa: ANN401 — any value of JSON
    """Return what is wrong with a conversation and what to do, None if nothing is."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return "has no list of messages", _ADVICE
    if not messages:
        return "has a conversation without messages", "add messages, or remove the row"
    roles = [message.get("role") for message in messages]
    for number, message in enumerate(messages, 1):
        if (fault := _find_message_fault(message, number, is_last=number == len(messages))) is not None:
            return fault
        if roles[max(0, number - 2) : number] == ["assistant", "assistant"]:
            return f"has two assistant messages in a row ({number - 1} and {number})", "merge them into one"
    if roles[-1] != "assistant":
        return f"has a last message with the role {roles[-1]!r}", "end with an assistant message"
    return ("has no message before the assistant's", "add the user's message") if len(messages) == 1 else None


def _find_message_fault(message: dict[str, Any], number: int, *, is_last: bool) -> tuple[str, str] | None:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else f"allowed: {', '.join(ROLES)}"
        return f"has the role {to_printable(str(role))!r} in message {number}", hint
    is_assistant = role == "assistant"
    if is_assistant and message.get("tool_calls") and not content and not is_last:
        return None
    if not isinstance(content, str):
        kind = "no content" if content is None else "content that is not text"
        return f"has {kind} in message {number}", "write the content as text"
    if is_assistant and not content.strip():
        return f"has an empty assistant message (message {number})", "write its text, or remove the row"
    return None


def read_template(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a chat template: the tokenizer's own (null), a bundled one, or a file.

    Raises:
        UnsupportedModelError: the tokenizer has no template.
        MissingFileError: the file does not exist.
    """
    bundled = {path.stem: path for path in sorted(TEMPLATE_DIR.glob("*.jinja"))}
    if name is None:
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise UnsupportedModelError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template",
                f"set task.chat_template to {' or '.join(bundled)}, or to the path of a Jinja file",
            )
        return str(template)
    path = bundled.get(name, Path(name))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise MissingFileError(
            f"task.chat_template={name!r} cannot be read: {reason}",
            f"set it to {', '.join(bundled)} or the path of a Jinja file",
        ) from error
