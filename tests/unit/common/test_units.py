"""Formatting of byte counts and durations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peftbench.cli.app import app
from peftbench.common.units import format_bytes, format_duration, parse_size
from peftbench.errors import BudgetError, OutOfRangeError
from peftbench.recipe.loader import load_recipe
from tests.helpers.recipe_files import REQUIRED_KEYS, write

MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize(
    ("num_bytes", "total_bytes", "text"),
    [
        (96 * MIB, 112 * MIB, "96 of 112 MiB"),
        (96 * MIB, None, "96 MiB"),
        (0, 112 * MIB, "0 of 112 MiB"),
        (8 * GIB - MIB, 8 * GIB, "8,191 of 8,192 MiB"),
        (int(13.14 * GIB), 16 * GIB, "13.1 of 16.0 GiB"),
        (200 * MIB, 80 * GIB, "0.2 of 80.0 GiB"),
        (12 * GIB, None, "12.0 GiB"),
    ],
)
def test_format_bytes_uses_one_unit(num_bytes: int, total_bytes: int | None, text: str) -> None:
    """Check that the larger size selects the unit: MiB below 10 GiB, else GiB."""
    assert format_bytes(num_bytes, total_bytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3_909, "1:05:09")])
def test_format_duration(seconds: float, text: str) -> None:
    """Seconds are rounded first, so that 60 seconds are a minute."""
    assert format_duration(seconds) == text


NOT_SIZES = [
    *("16,384MiB", "15,5GiB", "80%", "16Gbit", "16GiB/2"),  # read up to the first unknown character by pydantic
    *("1e400GiB", "1e3GiB", "-1GiB", "+1GiB", "nan", "inf", "NaN GiB", "0x10GiB", "1_6GiB", "1.5.5GiB", ".5GiB", "16."),
    *("16GiB 2", "16 Gi B", "16GiB16GiB", "GiB", "", " ", "16GiBs", "16 gigabytes", "~16GiB", "16GiB\\n", "16;GiB"),
    *(
        "\uff11\uff16GiB",
        "\u0661\u0666GiB",
        "16G\u0131B",
        "16\u212aiB",
        "16\u00a0GiB",
        "\u00bdGiB",
    ),  # other digits, letters
]
EMPTY_SIZES = ["0", "0GiB", "0.0", "0.4", "00"]


@pytest.mark.parametrize("text", NOT_SIZES)
def test_text_that_is_not_a_size_is_refused(text: str) -> None:
    """The whole text must match; the error quotes it."""
    with pytest.raises(BudgetError, match=rf"^{re.escape(repr(text))} is not a memory size; write e\.g\. 16GiB"):
        parse_size(text)


@pytest.mark.parametrize("text", EMPTY_SIZES)
def test_empty_size_is_refused(text: str) -> None:
    """A size below one byte is refused too; the error quotes the text."""
    with pytest.raises(BudgetError, match=rf"^a memory budget must be more than 0, not {re.escape(repr(text))}; write"):
        parse_size(text)


def test_size_beyond_any_number_is_refused() -> None:
    """The quoted text is shortened."""
    with pytest.raises(BudgetError, match=r"^'9{40}\.\.\.' is not a memory size"):
        parse_size("9" * 400 + "GiB")


@pytest.mark.parametrize(
    ("text", "size"), [("16gIb", 16 * GIB), (" 16  GiB ", 16 * GIB), ("0.5MB", 500_000), ("1024", 1024), ("7B", 7)]
)
def test_size_is_read(text: str, size: int) -> None:
    """Case and spaces around the number do not matter."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["16,384MiB", "80%", "16GiB/2", "1e400GiB", "-1GiB"])
def test_recipe_and_option_refuse_the_same_sizes(text: str, tmp_path: Path) -> None:
    """The sentences of budget.memory and of --budget quote the text."""
    recipe = write(tmp_path / "recipe.yaml", REQUIRED_KEYS)
    with pytest.raises(OutOfRangeError, match=rf"{re.escape(repr(text))} is not a memory size"):
        load_recipe([recipe], [f"budget.memory='{text}'"])
    result = CliRunner().invoke(app, ["estimate", str(recipe), "--device", "t4", f"--budget={text}"])
    assert result.exit_code == BudgetError.exit_code
    assert result.stderr == f"error: {text!r} is not a memory size; write e.g. 16GiB or 15500MiB\n"
