"""The page's colours: seen on their paper in every theme, and told apart without colours."""

from __future__ import annotations

import itertools
import re

import pytest

from peftbench.report.page.charts import SHAPES
from peftbench.report.page.series import COLOURS
from tests.report.page.pages import REPOSITORY

STYLE = (REPOSITORY / "src" / "peftbench" / "report" / "page" / "page.css").read_text(encoding="utf-8")
THEMES = [
    dict(re.findall(r"(--[a-z0-9]+): (#[0-9a-f]{3,6})", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.S)
]
"""Variables and their colours: light, dark, paper."""


def _light(colour: str) -> list[float]:
    """Linear red, green and blue (0 to 1) of ``#rrggbb`` or ``#rgb``."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    values = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    return [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]


def _contrast(one: str, other: str) -> float:
    """By WCAG 2.2: from 1 for equal colours to 21 for black on white."""
    levels = sorted(sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), _light(c), strict=True)) for c in (one, other))
    return (levels[1] + 0.05) / (levels[0] + 0.05)


def test_there_are_three_themes() -> None:
    """Light, dark and paper, each with all variables."""
    assert len(THEMES) == 3
    assert len({frozenset(theme) for theme in THEMES}) == 1
    assert {f"--k{index}" for index in range(COLOURS)} <= set(THEMES[0])


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark", "paper"])
def test_colours_stand_out_from_their_paper(theme: dict[str, str]) -> None:
    """Text at 4.5 to 1 and marks at 3 to 1, as the WCAG ask for."""
    assert _contrast("#000", "#fff") == pytest.approx(21)
    for name in ("--ink", "--soft", "--accent", "--good", "--bad"):
        assert _contrast(theme[name], theme["--paper"]) >= 4.5, name
    for name in [*(f"--k{index}" for index in range(COLOURS)), "--budget", "--front"]:
        assert _contrast(theme[name], theme["--paper"]) >= 3, name


DEUTERANOPIA = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))
PROTANOPIA = ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998))


def _seen(colour: str, matrix: tuple[tuple[float, ...], ...]) -> list[float]:
    """A colour as somebody sees it who is blind to some (Machado, Oliveira and Fernandes 2009, severity 1)."""
    return [sum(w * v for w, v in zip(row, _light(colour), strict=True)) for row in matrix]


@pytest.mark.parametrize("matrix", [DEUTERANOPIA, PROTANOPIA], ids=["deuteranopia", "protanopia"])
@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark", "paper"])
def test_groups_are_told_apart_by_who_sees_no_red_or_green(
    theme: dict[str, str], matrix: tuple[tuple[float, ...], ...]
) -> None:
    """No two of the first four groups look alike; of all groups, each has a shape of its own besides."""
    seen = [_seen(theme[f"--k{index}"], matrix) for index in range(4)]
    for one, other in itertools.combinations(seen, 2):
        assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 > 0.06
    assert len(set(SHAPES)) == COLOURS
