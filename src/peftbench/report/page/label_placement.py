"""Places the labels of points in a chart so that they overlap neither each other nor points, intervals and lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Align = Literal["left", "right"]

LABEL_POSITIONS: dict[str, tuple[Align, int, int]] = {
    "right above": ("left", 9, -7),
    "right below": ("left", 9, 13),
    "left above": ("right", -9, -7),
    "left below": ("right", -9, 13),
    "right far above": ("left", 9, -21),
    "right far below": ("left", 9, 27),
    "left far above": ("right", -9, -21),
    "left far below": ("right", -9, 27),
}
"""Positions of a label: text alignment, and offset of its baseline from the point in pixels. The first is preferred."""

PLOT_WIDTH, PLOT_HEIGHT = 300, 300
"""Pixels of a plot in the narrowest layout with three plots side by side."""
FONT_SIZE = 11
_CHAR_WIDTH = 0.58 * FONT_SIZE
_POINT_RADIUS = 7
_X_PADDING = 24
_RIGHT_MARGIN = 8
_LINE_WIDTH = 3


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; y grows downward."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """True if the two share an area."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


@dataclass(frozen=True)
class LabeledPoint:
    """A point in data coordinates, with its interval and its label."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def place_labels(
    points: Sequence[LabeledPoint], lines: Sequence[tuple[str, float]] = (), *, is_y_reversed: bool = False
) -> list[str | None]:
    """Return the position of each point's label, a key of ``LABEL_POSITIONS``; None where every one would overlap.

    ``lines`` are horizontal lines, each with its label, which starts at the left edge, and its y.
    """
    x_values = [point.x for point in points]
    y_values = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    y_values += [y for _, y in lines]
    if not points:
        return []
    to_x = _build_scale(x_values, PLOT_WIDTH, _X_PADDING)
    up = _build_scale(y_values, PLOT_HEIGHT, 0)

    def to_y(value: float) -> float:
        return up(value) if is_y_reversed else PLOT_HEIGHT - up(value)

    taken = [_build_point_box(to_x(point.x), to_y(point.y)) for point in points]
    intervals = [
        _build_line_box(to_x(point.x), to_y(point.low), to_y(point.high))
        for point in points
        if point.low is not None and point.high is not None
    ]
    for text, y in lines:
        taken.append(Box(0, to_y(y) - 1, PLOT_WIDTH, to_y(y) + 1))
        taken.append(_build_label_box(text, 0, to_y(y), ("left", 3, -3)))
    positions: list[str | None] = []
    for point in points:
        boxes = {
            name: _build_label_box(point.label, to_x(point.x), to_y(point.y), position)
            for name, position in LABEL_POSITIONS.items()
        }
        # A label across a thin interval is still readable, and better than none.
        obstacles = ([*taken, *intervals], taken)
        free = [name for avoided in obstacles for name, box in boxes.items() if _is_free(box, avoided)]
        name = next(iter(free), None)
        positions.append(name)
        if name is not None:
            taken.append(boxes[name])
    return positions


def _is_free(box: Box, taken: Sequence[Box]) -> bool:
    is_inside = box.left >= 0 and box.right <= PLOT_WIDTH + _RIGHT_MARGIN and box.top >= -FONT_SIZE
    return is_inside and not any(box.overlaps(other) for other in taken)


def _build_scale(values: Sequence[float], length: float, padding: float) -> Callable[[float], float]:
    """Return the linear function from data to pixels."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0

    def scale(value: float) -> float:
        return padding + (value - low) / span * (length - 2 * padding)

    return scale


def _build_point_box(x: float, y: float) -> Box:
    return Box(x - _POINT_RADIUS, y - _POINT_RADIUS, x + _POINT_RADIUS, y + _POINT_RADIUS)


def _build_line_box(x: float, low: float, high: float) -> Box:
    return Box(x - _LINE_WIDTH / 2, min(low, high), x + _LINE_WIDTH / 2, max(low, high))


def _build_label_box(text: str, x: float, y: float, position: tuple[Align, int, int]) -> Box:
    align, dx, dy = position
    width = _CHAR_WIDTH * len(text)
    left = x + dx - (width if align == "right" else 0)
    return Box(left, y + dy - FONT_SIZE * 0.8, left + width, y + dy + FONT_SIZE * 0.3)
