"""Chat: the conversations that are refused, and the templates that are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peftbench.data.sources import Files
from peftbench.errors import DataError, MissingFileError, UnsupportedModelError
from peftbench.tasks.chat import TEMPLATE_DIR, Chat, read_template
from tests.helpers.conversations import as_conversation, assistant, chat_encoder, user
from tests.helpers.tokenizers import character_tokenizer

if TYPE_CHECKING:
    from tests.helpers.conversations import Message

CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}
TOOL: Message = {"role": "tool", "content": "3"}
MISTAKES: list[tuple[Any, str, str]] = [
    ("Hi", "has no list of messages", 'write a list of objects like {"role": "user", "content": "..."}'),
    ({"role": "user"}, "has no list of messages", "write a list of objects"),
    (["Hi"], "has no list of messages", "write a list of objects"),
    ([], "has a conversation without messages", "add messages, or remove the row"),
    ([user("Q"), {"role": "asistant", "content": "A"}], "has the role 'asistant' in message 2", "did you mean 'assis"),
    ([{"role": 5, "content": "A"}], "has the role '5' in message 1", "allowed: system, developer, user, assistant, t"),
    ([{"content": "A"}], "has the role 'None' in message 1", "allowed: system, developer, user, assistant, tool"),
    (
        [user("Q"), assistant("A"), assistant("B")],
        "has two assistant messages in a row (2 and 3)",
        "merge them into one",
    ),
    ([user("Q")], "has a last message with the role 'user'", "end with an assistant message"),
    ([user("Q"), assistant("A"), TOOL], "has a last message with the role 'tool'", "end with an assistant message"),
    ([assistant("A")], "has no message before the assistant's", "add the user's message"),
    ([{"role": "user"}, assistant("A")], "has no content in message 1", "write the content as text"),
    ([{"role": "user", "content": None}, assistant("A")], "has no content in message 1", "write the content as text"),
    ([{"role": "user", "content": 5}, assistant("A")], "has content that is not text in message 1", "write the cont"),
    (
        [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, assistant("A")],
        "has content that is not text in message 1",
        "write the content as text",
    ),
    ([user("Q"), assistant(" \n")], "has an empty assistant message (message 2)", "write its text, or remove the row"),
    ([user("Q"), CALL], "has no content in message 2", "write the content as text"),
    ([user("Q"), CALL | {"content": ""}], "has an empty assistant message (message 2)", "write its text, or remove"),
]


@pytest.mark.parametrize(("messages", "fault", "advice"), MISTAKES, ids=[mistake[1] for mistake in MISTAKES])
def test_unusable_conversation_is_refused(messages: Any, fault: str, advice: str) -> None:
    """The fault names the message and the column."""
    found = Chat(messages="turns").check_example({"id": "0", "messages": json.dumps(messages)})
    assert found is not None
    assert found.content == f"{fault} in column 'turns'"
    assert found.advice.startswith(advice)


@pytest.mark.parametrize(
    "messages",
    [
        [user("Q"), assistant("A")],
        [user(""), assistant("A")],
        [{"role": "system", "content": "S"}, user("Q"), assistant("A"), user("Q"), assistant("B")],
        [{"role": "developer", "content": "S"}, user("Q"), user("R"), assistant("A")],
        [user("Q"), CALL, TOOL, assistant("A")],
        [user("Q"), CALL | {"content": ""}, TOOL, TOOL, assistant("A")],
        [user("Q") | {"name": "Ann", "content": "Q"}, assistant("A") | {"weight": 1}],
    ],
)
def test_usable_conversation_is_accepted(messages: list[Message]) -> None:
    """Calls of tools need no content, and further keys are left to the template."""
    assert Chat().check_example({"id": "0", "messages": json.dumps(messages)}) is None


def test_refusal_names_the_file_and_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first examples are checked before the model is loaded."""
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [user("Q"), assistant("A")]}, {"messages": [user("Q")]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)), encoding="utf-8")
    source = Files(train=str(path))
    with pytest.raises(DataError) as error:
        source.check("train", Chat().select_columns(None))
    assert str(error.value) == (
        f"example 0 (line 1) of the train split of {path} has a last message with the role 'user' in column "
        "'messages'; end with an assistant message"
    )


def test_prompt_and_reference_are_those_of_the_last_turn() -> None:
    """The prompt for samples and for the overlap of splits has the role before each message."""
    example = as_conversation([user("Q"), assistant("A"), user("R"), CALL, TOOL, assistant("B")])
    assert Chat().get_prompt(example) == "user: Q\nassistant: A\nuser: R\nassistant: \ntool: 3"
    assert Chat().get_reference(example) == "B"


# --- templates -------------------------------------------------------------------------------------------------------


def test_tokenizer_without_a_template_is_refused_with_the_bundled_ones() -> None:
    """The error names the templates that peftbench has."""
    tokenizer = character_tokenizer()
    with pytest.raises(UnsupportedModelError) as error:
        chat_encoder(tokenizer, Chat())
    assert str(error.value) == (
        f"the tokenizer {tokenizer.name_or_path!r} has no chat template; set task.chat_template to chatml or plain, or "
        "to the path of a Jinja file"
    )


def test_template_is_the_tokenizer_s_own_or_the_named_one(tmp_path: Path) -> None:
    """A name is a bundled template, any other text the path of a file; a dictionary has a default."""
    tokenizer = character_tokenizer(template="own")
    (tmp_path / "own.jinja").write_text("file", encoding="utf-8")
    assert read_template(None, tokenizer) == "own"
    assert read_template("plain", tokenizer) == (TEMPLATE_DIR / "plain.jinja").read_text(encoding="utf-8")
    assert read_template(str(tmp_path / "own.jinja"), tokenizer) == "file"
    tokenizer.chat_template = {"default": "first", "tool_use": "second"}
    assert read_template(None, tokenizer) == "first"
    tokenizer.chat_template = {"tool_use": "second"}
    with pytest.raises(UnsupportedModelError, match="has no chat template"):
        read_template(None, tokenizer)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.jinja", "No such file or directory"),
        ("folder", "Is a directory"),
        ("bytes.jinja", "it is not UTF-8 text"),
        ("chat_ml", "No such file or directory"),
    ],
)
def test_unreadable_template_file_is_refused(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the value, the cause and the bundled names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    with pytest.raises(MissingFileError) as error:
        read_template(name, character_tokenizer())
    assert str(error.value) == (
        f"task.chat_template={name!r} cannot be read: {reason}; set it to chatml, plain or the path of a Jinja file"
    )
