"""The page's colors: contrast with the background in each theme, and distance for each color vision."""

from __future__ import annotations

import itertools
import math
import re

import pytest

from peftbench.report.page.charts import NUM_CATEGORY_COLORS, SHAPES
from peftbench.report.page.series import NUM_COLORS
from peftbench.report.text.memory_categories import MEMORY_CATEGORY_LABELS
from tests.helpers.paths import REPOSITORY

STYLE = (REPOSITORY / "src" / "peftbench" / "report" / "page" / "page.css").read_text(encoding="utf-8")
THEMES = [
    dict(re.findall(r"(--[a-z0-9]+): (#[0-9a-f]{3,6})", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.S)
]
"""Variables and their colors in the light, dark and print themes."""


def _linear_rgb(color: str) -> list[float]:
    """Return linear red, green and blue (0 to 1) of ``#rrggbb`` or ``#rgb``."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    values = [int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)]
    return [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]


def _contrast(first: str, second: str) -> float:
    """Return the contrast by WCAG 2.2: from 1 for equal colors to 21 for black on white."""
    luminances = sorted(
        sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), _linear_rgb(c), strict=True)) for c in (first, second)
    )
    return (luminances[1] + 0.05) / (luminances[0] + 0.05)


def test_page_has_three_themes() -> None:
    """Check that the light, dark and print themes define the same variables."""
    assert len(THEMES) == 3
    assert len({frozenset(theme) for theme in THEMES}) == 1
    assert {f"--k{index}" for index in range(NUM_COLORS)} <= set(THEMES[0])


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark", "print"])
def test_colors_contrast_with_the_background(theme: dict[str, str]) -> None:
    """Check the minimum contrasts of WCAG: 4.5 to 1 for text and 3 to 1 for marks."""
    assert _contrast("#000", "#fff") == pytest.approx(21)
    for name in ("--ink", "--soft", "--accent", "--good", "--bad"):
        assert _contrast(theme[name], theme["--paper"]) >= 4.5, name
    marks = [*(f"--k{k}" for k in range(NUM_COLORS)), *(f"--m{m}" for m in range(NUM_CATEGORY_COLORS))]
    for name in (*marks, "--front"):
        assert _contrast(theme[name], theme["--paper"]) >= 3, name


COLOR_VISIONS = {
    "normal": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
}
"""Matrices from linear RGB to perceived linear RGB (Machado, Oliveira, Fernandes 2009)."""

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


def _multiply(matrix: tuple[tuple[float, ...], ...], vector: list[float]) -> list[float]:
    return [sum(w * v for w, v in zip(row, vector, strict=True)) for row in matrix]


def _perceive(color: str, vision: str) -> list[float]:
    """Return a color in OKLab (Ottosson 2020) for a color vision; a just noticeable difference is about 0.02."""
    linear = [min(max(value, 0.0), 1.0) for value in _multiply(COLOR_VISIONS[vision], _linear_rgb(color))]
    return _multiply(LAB, [value ** (1 / 3) for value in _multiply(LMS, linear)])


@pytest.mark.parametrize("vision", COLOR_VISIONS)
@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark", "print"])
def test_colors_differ_for_every_color_vision(theme: dict[str, str], vision: str) -> None:
    """Check that run groups, and the categories of a bar, differ by several just noticeable differences."""
    groups = [f"--k{index}" for index in range(NUM_COLORS)]
    categories = [f"--m{index}" for index in range(list(MEMORY_CATEGORY_LABELS).index("unattributed") + 1)]
    assert len(categories) == 10
    for names in (groups, categories):
        for first, second in itertools.combinations(names, 2):
            distance = math.dist(_perceive(theme[first], vision), _perceive(theme[second], vision))
            assert distance > 0.08, (first, second, distance)


def test_every_group_has_its_own_shape() -> None:
    """Check that a point's shape identifies its group without color."""
    assert len(set(SHAPES)) == NUM_COLORS
