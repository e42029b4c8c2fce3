"""The picture in README.md."""

from __future__ import annotations

from tests.helpers.paths import REPOSITORY
from tests.unit.report.page.picture import PICTURE, render_block


def test_picture_is_current() -> None:
    """Check that README.md shows the current page of the current records; ``make picture`` renews it."""
    assert render_block() in (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert PICTURE.read_bytes().startswith(b"\x89PNG")
