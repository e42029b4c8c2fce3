"""Every error class has an exit code of its own and a line in the module's docstring."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftbench import errors
from peftbench.common.console import INTERRUPT_EXIT_CODE
from peftbench.errors import REGRESSION_EXIT_CODE, PeftbenchError, did_you_mean
from peftbench.record import EXIT_CODES

SHELL_EXIT_CODES = {2, 126, 127, 130}
"""Exit codes that typer, the shell and Ctrl-C use."""


def iter_classes(root: type[PeftbenchError] = PeftbenchError) -> Iterator[type[PeftbenchError]]:
    """Yield ``root`` and all its subclasses."""
    yield root
    for child in root.__subclasses__():
        yield from iter_classes(child)


def parse_docstring_tree() -> dict[str, tuple[int, str | None]]:
    """Return exit code and parent of every class in the docstring's tree, by name."""
    tree: dict[str, tuple[int, str | None]] = {}
    ancestors: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([\s│├└─]*)(\w+Error) +(\d+)\b", line)
        if not match:
            continue
        depth, name = len(match.group(1)), match.group(2)
        ancestors = [entry for entry in ancestors if entry[0] < depth]
        tree[name] = (int(match.group(3)), ancestors[-1][1] if ancestors else None)
        ancestors.append((depth, name))
    return tree


CLASSES = list(iter_classes())


def test_class_walk_and_docstring_parser_find_the_tree() -> None:
    """The helpers of this file find all classes, so that the tests below check something."""
    assert len(CLASSES) >= 19
    assert len(parse_docstring_tree()) >= 19


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_class_defines_its_exit_code(kind: type[PeftbenchError]) -> None:
    """Every class defines an exit code itself, below the shell's codes for signals."""
    assert "exit_code" in vars(kind)
    assert 0 < kind.exit_code < 126


def test_exit_codes_are_distinct() -> None:
    """Errors, outcomes, comparisons and the shell share no exit code."""
    codes = [kind.exit_code for kind in CLASSES] + [*EXIT_CODES.values(), REGRESSION_EXIT_CODE]
    assert len(codes) == len(set(codes))
    assert not SHELL_EXIT_CODES.intersection(codes)


def test_errors_page_lists_every_exit_code_once() -> None:
    """docs/reference/errors.md lists each exit code of the commands, and no other."""
    page = Path(__file__).resolve().parents[2] / "docs" / "reference" / "errors.md"
    listed = sorted(int(code) for code in re.findall(r"\| (\d+) (?=\|)", page.read_text(encoding="utf-8")))
    expected = (
        {kind.exit_code for kind in CLASSES} | set(EXIT_CODES.values()) | {REGRESSION_EXIT_CODE, INTERRUPT_EXIT_CODE, 2}
    )
    assert listed == sorted(expected)


def test_docstring_tree_matches_the_classes() -> None:
    """The tree in the docstring has every class with its exit code and parent, and no other."""
    expected = {
        kind.__name__: (kind.exit_code, None if kind is PeftbenchError else kind.__base__.__name__)  # type: ignore[union-attr]
        for kind in CLASSES
    }
    assert parse_docstring_tree() == expected


def test_hint_follows_the_message() -> None:
    """The hint is appended to the message, if there is one."""
    assert str(PeftbenchError("this is wrong", "do that")) == "this is wrong; do that"
    assert str(PeftbenchError("this is wrong")) == "this is wrong"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gobal_batch", "did you mean 'global_batch_size'? (allowed: steps, global_batch_size)"),
        ("zzzzz", "allowed: steps, global_batch_size"),
    ],
)
def test_did_you_mean_suggests_the_nearest_name(name: str, expected: str) -> None:
    """A misspelled name gets the nearest allowed name, an unrelated one only the list."""
    assert did_you_mean(name, ["steps", "global_batch_size"]) == expected
