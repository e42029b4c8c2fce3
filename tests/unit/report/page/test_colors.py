"""The page's colours: seen on their paper in every theme, and told apart without colours."""

from __future__ import annotations

import itertools
import math
import re

import pytest

from peftbench.report.page.charts import NUM_CATEGORY_COLORS, SHAPES
from peftbench.report.page.memory_chart import CATEGORY_LABELS
from peftbench.report.page.series import NUM_COLORS
from tests.helpers.paths import REPOSITORY

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
    assert {f"--k{index}" for index in range(NUM_COLORS)} <= set(THEMES[0])


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark", "paper"])
def test_colours_stand_out_from_their_paper(theme: dict[str, str]) -> None:
    """Text at 4.5 to 1 and marks at 3 to 1, as the WCAG ask for."""
    assert _contrast("#000", "#fff") == pytest.approx(21)
    for name in ("--ink", "--soft", "--accent", "--good", "--bad"):
        assert _contrast(theme[name], theme["--paper"]) >= 4.5, name
    marks = [*(f"--k{k}" for k in range(NUM_COLORS)), *(f"--m{m}" for m in range(NUM_CATEGORY_COLORS))]
    for name in (*marks, "--front"):
        assert _contrast(theme[name], theme["--paper"]) >= 3, name


SIGHTS = {
    "all": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
}
"""How linear colours look to those who see all of them, and to those who do not (Machado, Oliveira, Fernandes 2009)."""

LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


def _times(matrix: tuple[tuple[float, ...], ...], vector: list[float]) -> list[float]:
    return [sum(w * v for w, v in zip(row, vector, strict=True)) for row in matrix]


def _seen(colour: str, sight: str) -> list[float]:
    """OKLab (Ottosson 2020) of a colour as somebody sees it: a just noticeable difference is about 0.02."""
    linear = [min(max(value, 0.0), 1.0) for value in _times(SIGHTS[sight], _light(colour))]
    return _times(LAB, [value ** (1 / 3) for value in _times(LMS, linear)])


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark", "paper"])
def test_colours_are_told_apart_by_everybody(theme: dict[str, str], sight: str) -> None:
    """No two groups look alike, nor two parts of a bar: several times what can just be noticed lies between them."""
    groups = [f"--k{index}" for index in range(NUM_COLORS)]
    tensors = [f"--m{index}" for index in range(list(CATEGORY_LABELS).index("unattributed") + 1)]
    assert len(tensors) == 10
    for names in (groups, tensors):
        for one, other in itertools.combinations(names, 2):
            apart = math.dist(_seen(theme[one], sight), _seen(theme[other], sight))
            assert apart > 0.08, (one, other, apart)


def test_every_group_has_a_shape_of_its_own() -> None:
    """Where no colour is seen at all, a point's shape says whose it is."""
    assert len(set(SHAPES)) == NUM_COLORS
