"""A real browser that opens the page from a file without a network; tests are skipped if it is not installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.helpers.browser import BROWSERS, OpenPage, open_pages

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Start a headless Chromium; skip the test if it is not installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable_path = next((executable for name in BROWSERS if (executable := shutil.which(name))), None)
    if executable_path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on PATH; run apt-get install chromium")
    with playwright.sync_playwright() as playwright_api:
        # Chromium has no sandbox for root in a container; the pages are our own.
        chromium = playwright_api.chromium.launch(executable_path=executable_path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Yield a function that opens a file; the pages are closed after the test."""
    with open_pages(browser) as open_page:
        yield open_page
