"""Labels of points do not overlap each other, points, intervals or lines."""

from __future__ import annotations

import itertools
import random

import pytest

from peftbench.report.page import label_placement
from peftbench.report.page.label_placement import LABEL_POSITIONS, Box, LabeledPoint, place_labels


def placed_boxes(points: list[LabeledPoint], positions: list[str | None]) -> list[Box]:
    """Return the boxes of the placed labels of points without intervals or lines."""
    to_x = label_placement._build_scale([point.x for point in points], label_placement.PLOT_WIDTH, 24)
    to_y = label_placement._build_scale([point.y for point in points], label_placement.PLOT_HEIGHT, 0)
    return [
        label_placement._build_label_box(
            point.label, to_x(point.x), label_placement.PLOT_HEIGHT - to_y(point.y), LABEL_POSITIONS[name]
        )
        for point, name in zip(points, positions, strict=True)
        if name is not None
    ]


@pytest.mark.parametrize("seed", range(20))
def test_placed_labels_do_not_overlap(seed: int) -> None:
    """On random points, also with several at one place; most points are labeled."""
    generator = random.Random(seed)  # noqa: S311
    points = [
        LabeledPoint(f"run_{n}", generator.choice([1.0, 2.0, generator.random()]), generator.random()) for n in range(8)
    ]
    positions = place_labels(points)
    boxes = placed_boxes(points, positions)
    assert len(boxes) >= 5
    assert not any(first.overlaps(second) for first, second in itertools.combinations(boxes, 2))


def test_single_point_is_labeled_at_its_right() -> None:
    """The first position is preferred."""
    assert place_labels([LabeledPoint("lora", 1.0, 2.0)]) == ["right above"]


def test_last_point_is_labeled_at_its_left() -> None:
    """A long label at the right edge would leave the plot."""
    points = [LabeledPoint("a", 0.0, 1.0), LabeledPoint("a_long_name_of_a_run", 1.0, 2.0)]
    assert place_labels(points)[1] == "left below"


def test_label_avoids_intervals_and_lines() -> None:
    """A neighbor's interval and a baseline with its label are kept free."""
    points = [LabeledPoint("full", 1.0, 5.0), LabeledPoint("b", 1.1, 5.0, 0.0, 10.0), LabeledPoint("c", 2.0, 5.0)]
    assert place_labels(points)[0] != "right above"
    assert (
        place_labels([LabeledPoint("full", 0.0, 5.0), LabeledPoint("c", 9.0, 0.0)], [("lead_1_baseline", 5.1)])[0]
        != "right above"
    )


def test_crowded_points_have_no_label() -> None:
    """The legend alone names a point if each position overlaps."""
    positions = place_labels([LabeledPoint(f"run_{n}", 1.0, 1.0) for n in range(12)])
    assert None in positions
    named = [name for name in positions if name is not None]
    assert len(named) == len(set(named)) > 0


def test_no_points_have_no_labels() -> None:
    """There is nothing to place."""
    assert place_labels([]) == []
