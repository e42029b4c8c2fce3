"""A real browser that opens the page from a file without a network; tests are skipped if it is not installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.browser import BROWSERS, OpenedPage, OpenPage

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
    """Yield a function that opens a file and waits until each chart is drawn or has failed."""
    contexts = []

    def open_file(path: Path, *, width: int = 1280, height: int = 900, **context_options: Any) -> OpenedPage:
        context = browser.new_context(viewport={"width": width, "height": height}, **context_options)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(30_000)
        opened_page = OpenedPage(tab)
        tab.on("console", lambda message: opened_page.console.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: opened_page.console.append(f"error: {error}"))
        tab.on("request", lambda request: opened_page.requests.append(request.url))
        tab.goto(path.resolve().as_uri())
        if context_options.get("java_script_enabled", True):
            tab.wait_for_function(
                "[...document.querySelectorAll('[data-chart]')].every(b => b.dataset.drawn || b.matches('.failed'))"
            )
        return opened_page

    yield open_file
    for context in contexts:
        context.close()
