"""Choices: the readings of an answer, and the sequences whose log-likelihoods are compared."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peftbench.data.encode import Encoder, SequenceLayout
from peftbench.errors import SequenceTooShortError
from peftbench.tasks.choices import Choices, find_answers
from tests.helpers.tokenizers import character_tokenizer, list_labels, list_tokens

TEXTS = ["red", "blue", "green"]


def as_question(answer: Any, choices: Any = TEXTS, prompt: str = "Sky?") -> dict[str, str]:
    """Return a question as a row of a data set."""
    return {"id": "0", "prompt": prompt, "choices": json.dumps(choices), "answer": json.dumps(answer)}


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "index"),
    [("blue", 1), (" blue\n", 1), (1, 1), ("1", 1), ("B", 1), ("b", 1), (0, 0), ("C", 2), ("green", 2)],
)
def test_answer_is_a_text_an_index_or_a_letter(answer: str | int, index: int) -> None:
    """Spaces around it and the case of a letter do not count."""
    example = as_question(answer)
    assert Choices().check_example(example) is None
    assert Choices().get_choices(example) == (tuple(TEXTS), index)
    assert Choices().get_reference(example) == TEXTS[index]


@pytest.mark.parametrize(
    ("answer", "choices", "readings"),
    [
        ("1", ["0", "1", "2"], {"text": 1, "index": 1}),
        (2, ["4", "3", "2"], {"text": 2, "index": 2}),
        ("A", ["A", "B"], {"text": 0, "letter": 0}),
    ],
)
def test_readings_that_agree_are_accepted(answer: str | int, choices: list[str], readings: dict[str, int]) -> None:
    """An answer may be read in several ways if they give the same choice."""
    assert find_answers(answer, choices) == readings
    assert Choices().check_example(as_question(answer, choices)) is None


@pytest.mark.parametrize(
    ("answer", "choices", "described"),
    [
        ("1", ["1", "2", "3"], "'1', which has two readings (as text it is choice 0, as index it is choice 1)"),
        (1, ["1", "2", "3"], "'1', which has two readings (as text it is choice 0, as index it is choice 1)"),
        ("A", ["B", "A"], "'A', which has two readings (as text it is choice 1, as letter it is choice 0)"),
        ("a", ["b", "a"], "'a', which has two readings (as text it is choice 1, as letter it is choice 0)"),
    ],
)
def test_answer_with_two_readings_is_refused(answer: str | int, choices: list[str], described: str) -> None:
    """The fault has each reading and its choice."""
    fault = Choices().check_example(as_question(answer, choices))
    assert fault is not None
    assert fault.content == f"has the answer {described}"
    assert fault.advice == "write the choice's text"


@pytest.mark.parametrize(
    "answer", ["yellow", "D", "3", 3, -1, 1.0, True, ["red"], {"text": "red"}, "", "²", "AB", None]
)
def test_answer_that_is_no_choice_is_refused(answer: Any) -> None:
    """The fault has the answer and the three ways to write it."""
    fault = Choices().check_example(as_question(answer))
    assert fault is not None
    assert fault.content.endswith(", which is not among its 3 choices")
    assert fault.advice == "write the choice's text, its index from 0, or its letter"


@pytest.mark.parametrize(
    ("choices", "content"),
    [
        ("red", "has no list of texts in column 'options'"),
        ({"text": TEXTS}, "has no list of texts in column 'options'"),
        (["red", 2], "has no list of texts in column 'options'"),
        (["red", " "], "has an empty choice in column 'options'"),
        (["red"], "has fewer than two different choices in column 'options'"),
        ([], "has fewer than two different choices in column 'options'"),
        (["red", "blue", " red"], "has fewer than two different choices in column 'options'"),
    ],
)
def test_unusable_choices_are_refused(choices: Any, content: str) -> None:
    """The fault names the column."""
    fault = Choices(choices="options").check_example(as_question("red", choices))
    assert fault is not None
    assert fault.content == content
    assert fault.advice == "write a list of at least two different texts"


# --- sequences -------------------------------------------------------------------------------------------------------


def make_encoder(task: Choices, max_length: int = 100) -> Encoder:
    """Return an encoder of questions with a tokenizer that adds a start token."""
    return Encoder(character_tokenizer(start="<s>"), SequenceLayout(max_length, 0), task)


@pytest.mark.parametrize(
    ("separator", "shown"),
    [(" ", "{s}Sky?[ CHOICE]"), ("\nAnswer: ", "{s}Sky?\nAnswer:[ CHOICE]"), ("\n", "{s}Sky?\n[CHOICE]")],
)
def test_each_choice_follows_the_prompt_without_an_end_token(separator: str, shown: str) -> None:
    """Only the choice's tokens count, with the space before it. Training has the right one and the end token."""
    encoder = make_encoder(Choices(separator=separator))
    rows = encoder.encode_choices(as_question("blue", ["red", " blue "]))
    assert [list_labels(encoder.tokenizer, row) for row in rows] == [
        shown.replace("CHOICE", choice) for choice in ("red", "blue")
    ]
    trained = encoder.encode_example(as_question("blue", ["red", " blue "]))
    assert list_labels(encoder.tokenizer, trained) == shown.replace("CHOICE]", "blue{e}]")


def test_too_long_a_prompt_loses_its_start_for_each_choice() -> None:
    """Each choice keeps as much of the prompt as fits with it."""
    encoder = make_encoder(Choices(), max_length=10)
    rows = encoder.encode_choices(as_question("red", prompt="0123456789"))
    assert [list_labels(encoder.tokenizer, row) for row in rows] == [
        "{s}56789[ red]",
        "{s}6789[ blue]",
        "{s}789[ green]",
    ]
    trained = encoder.encode_example(as_question("red", prompt="0123456789"))
    assert list_tokens(encoder.tokenizer, trained["input_ids"]) == "{s}6789 red{e}"
    assert trained["cut_tokens"] == 6
    assert trained["needed"] == len("#9 red#")
    assert trained["prompt_needed"] == len("#9 green")  # the longest choice must fit too


def test_choice_that_does_not_fit_is_refused() -> None:
    """The right choice may fit when another does not."""
    encoder = make_encoder(Choices(), max_length=7)
    assert encoder.encode_example(as_question("red"))["needed"] == 7
    with pytest.raises(SequenceTooShortError) as error:
        encoder.encode_choices(as_question("red"))
    assert str(error.value) == "example 0 with one of its choices does not fit 7 tokens; raise data.max_length"


def test_names_of_special_tokens_are_text() -> None:
    """No choice can end the sequence."""
    encoder = make_encoder(Choices())
    rows = encoder.encode_choices(as_question(0, ["<e>", "<s>"]))
    assert [list_labels(encoder.tokenizer, row) for row in rows] == ["{s}Sky?[ <e>]", "{s}Sky?[ <s>]"]
