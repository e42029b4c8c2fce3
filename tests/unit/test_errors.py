"""Every mistake has a class, a place in the tree of the module's docstring, and an exit code of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftbench import errors
from peftbench.common.console import INTERRUPT_EXIT_CODE
from peftbench.errors import REGRESSION_EXIT_CODE, PeftbenchError, did_you_mean
from peftbench.record import EXIT_CODES

SHELL = {2, 126, 127, 130}
"""Exit codes that typer, the shell and Ctrl-C already have."""


def classes(root: type[PeftbenchError] = PeftbenchError) -> Iterator[type[PeftbenchError]]:
    """``root`` and every class below it."""
    yield root
    for child in root.__subclasses__():
        yield from classes(child)


def drawn() -> dict[str, tuple[int, str | None]]:
    """Exit code and parent of every class in the docstring's tree, by its name."""
    found: dict[str, tuple[int, str | None]] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([\s│├└─]*)(\w+Error) +(\d+)\b", line)
        if not match:
            continue
        depth, name = len(match.group(1)), match.group(2)
        above = [entry for entry in above if entry[0] < depth]
        found[name] = (int(match.group(3)), above[-1][1] if above else None)
        above.append((depth, name))
    return found


CLASSES = list(classes())


def test_there_are_classes_to_check() -> None:
    """The walk finds the whole tree, so that the tests over it test something."""
    assert len(CLASSES) >= 19
    assert len(drawn()) >= 19


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_class_has_a_code_of_its_own(kind: type[PeftbenchError]) -> None:
    """A class states its exit code itself, and it is one that a process can end with."""
    assert "exit_code" in vars(kind)
    assert 0 < kind.exit_code < 126


def test_exit_codes_are_distinct() -> None:
    """No two errors, no error and an outcome, a comparison or the shell share an exit code."""
    codes = [kind.exit_code for kind in CLASSES] + [*EXIT_CODES.values(), REGRESSION_EXIT_CODE]
    assert len(codes) == len(set(codes))
    assert not SHELL.intersection(codes)


def test_the_page_has_every_code_once() -> None:
    """docs/reference/errors.md names each code that a command can end with, and no other."""
    page = Path(__file__).resolve().parents[2] / "docs" / "reference" / "errors.md"
    listed = sorted(int(code) for code in re.findall(r"\| (\d+) (?=\|)", page.read_text(encoding="utf-8")))
    ends = (
        {kind.exit_code for kind in CLASSES} | set(EXIT_CODES.values()) | {REGRESSION_EXIT_CODE, INTERRUPT_EXIT_CODE, 2}
    )
    assert listed == sorted(ends)


def test_the_docstring_draws_every_class() -> None:
    """The tree in the docstring names every class, its exit code and its parent, and no other."""
    real = {
        kind.__name__: (kind.exit_code, None if kind is PeftbenchError else kind.__base__.__name__)  # type: ignore[union-attr]
        for kind in CLASSES
    }
    assert drawn() == real


def test_a_sentence_and_what_to_do() -> None:
    """The hint follows the message in the same sentence, and only where there is one."""
    assert str(PeftbenchError("this is wrong", "do that")) == "this is wrong; do that"
    assert str(PeftbenchError("this is wrong")) == "this is wrong"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gobal_batch", "did you mean 'global_batch'? (allowed: steps, global_batch)"),
        ("zzzzz", "allowed: steps, global_batch"),
    ],
)
def test_nearest_names_what_may_have_been_meant(name: str, expected: str) -> None:
    """A misspelt name gets the nearest allowed one, a strange one only the list."""
    assert did_you_mean(name, ["steps", "global_batch_size"]) == expected
