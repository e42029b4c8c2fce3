"""The picture in README.md."""

from __future__ import annotations

from tests.helpers.paths import REPOSITORY
from tests.unit.report.page.picture import PICTURE, block


def test_the_picture_is_of_the_page_as_it_is() -> None:
    """README.md shows a picture that was made of the shipped records by today's page; ``make picture`` renews it."""
    assert block() in (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert PICTURE.read_bytes().startswith(b"\x89PNG")
