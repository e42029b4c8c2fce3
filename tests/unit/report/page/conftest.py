"""A real browser that opens the page from a file, with no network; skips where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Opened:
    """A page in the browser, and what happened when it was opened."""

    page: Page
    said: list[str] = field(default_factory=list)
    """Everything on the console, and every error."""
    asked: list[str] = field(default_factory=list)
    """Every address that it asked for."""

    def see(self, script: str) -> Any:
        """What a script in the page gives."""
        return self.page.evaluate(script)


Open = Callable[..., Opened]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on the path: apt-get install chromium")
    with playwright.sync_playwright() as started:
        # As root, in a container, its sandbox cannot be had; what it opens is ours.
        chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Opens a file, waits until every chart is drawn or has failed, and notes all that is said and asked for."""
    contexts = []

    def open_file(path: Path, *, width: int = 1280, height: int = 900, **knobs: Any) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": height}, **knobs)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        found = Opened(page)
        page.on("console", lambda message: found.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: found.said.append(f"error: {error}"))
        page.on("request", lambda request: found.asked.append(request.url))
        page.goto(path.resolve().as_uri())
        if knobs.get("java_script_enabled", True):
            page.wait_for_function(
                "[...document.querySelectorAll('[data-chart]')].every(b => b.dataset.drawn || b.matches('.failed'))"
            )
        return found

    yield open_file
    for context in contexts:
        context.close()
