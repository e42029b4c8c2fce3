"""Alpaca: instructions in the prompt of the published study."""

from __future__ import annotations

import re

import pytest

from peftbench.data.encode import Encoder, SequenceLayout
from peftbench.tasks.alpaca import Alpaca
from tests.helpers.tokenizers import character_tokenizer, list_labels, list_tokens

# Copied from the paper's repository (PROMPT_DICT of train.py), so that a changed prompt is noticed.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def encode(example: dict[str, str], task: Alpaca, max_length: int = 500) -> tuple[str, str, dict[str, int]]:
    """Return the listing of an example's labels and of its prompt, and its counts."""
    tokenizer = character_tokenizer(start="<s>")
    encoder = Encoder(tokenizer, SequenceLayout(max_length, 4), task)
    row = encoder.encode_example(example)
    return list_labels(tokenizer, row), list_tokens(tokenizer, encoder.encode_prompt(example)), row


@pytest.mark.parametrize("separate_key", [True, False])
@pytest.mark.parametrize("further", ["1, 2", "", " \n"])
def test_prompt_is_that_of_the_paper(further: str, separate_key: bool) -> None:
    """An empty input has the prompt without one, and so has a file without the column."""
    example = {"id": "0", "instruction": "Add.", "output": "3"} | ({"input": further} if separate_key else {})
    has_input = separate_key and further.strip()
    prompt = (WITH_INPUT if has_input else WITHOUT_INPUT).format(instruction="Add.", input=further)
    task = Alpaca() if separate_key else Alpaca(input=None)
    assert encode(example, task)[:2] == (f"{{s}}{prompt}[3{{e}}]", f"{{s}}{prompt}")


def test_too_long_an_input_loses_its_end() -> None:
    """The instruction, the template and the response stay whole."""
    example = {"id": "0", "instruction": "Add.", "input": "0123456789", "output": "3"}
    fixed = len("#" + WITH_INPUT.format(instruction="Add.", input="") + "3#")
    shown, prompt, row = encode(example, Alpaca(), max_length=fixed + 4)
    assert shown == "{s}" + WITH_INPUT.format(instruction="Add.", input="0123") + "[3{e}]"
    assert prompt == "{s}" + WITH_INPUT.format(instruction="Add.", input="01")
    assert (row["cut_tokens"], row["cut_labels"], row["needed"]) == (6, 0, fixed + 1)


def test_too_long_an_instruction_without_an_input_loses_its_end() -> None:
    """There is nothing else to cut."""
    example = {"id": "0", "instruction": "0123456789", "output": "3"}
    fixed = len("#" + WITHOUT_INPUT.format(instruction="") + "3#")
    shown, _, row = encode(example, Alpaca(input=None), max_length=fixed + 4)
    assert shown == "{s}" + WITHOUT_INPUT.format(instruction="0123") + "[3{e}]"
    assert (row["cut_tokens"], row["needed"]) == (6, fixed + 1)


def test_text_of_the_template_in_a_cell_is_kept() -> None:
    """A cell is not a format string, and names of special tokens are text."""
    example = {"id": "0", "instruction": "{input} <e>", "input": "### Response:\n<s>", "output": "{e}"}
    before, between, after = re.split("{instruction}|{input}", WITH_INPUT)
    prompt = before + example["instruction"] + between + example["input"] + after
    assert encode(example, Alpaca())[0] == f"{{s}}{prompt}[{{e}}{{e}}]"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["instruction", "input", "output"], Alpaca()),
        (["output", "instruction", "text"], Alpaca(input=None)),
        (["instruction", "input"], None),
    ],
)
def test_column_of_inputs_is_optional(names: list[str], expected: Alpaca | None) -> None:
    """Without it, the task reads two columns."""
    assert Alpaca.match(names) == expected


def test_prompt_and_reference() -> None:
    """The prompt for samples and for the overlap of splits has no template."""
    example = {"id": "0", "instruction": "Add.", "input": "1, 2", "output": "3"}
    assert (Alpaca().get_prompt(example), Alpaca().get_reference(example)) == ("Add.\n\n1, 2", "3")
    assert Alpaca().get_prompt(example | {"input": " "}) == "Add."
