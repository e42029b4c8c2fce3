"""A page in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
"""Executables of Chromium, in order of preference."""


@dataclass
class OpenedPage:
    """A page in the browser, with its console messages and requests."""

    tab: Page
    console: list[str] = field(default_factory=list)
    """Console messages and uncaught errors."""
    requests: list[str] = field(default_factory=list)
    """Requested addresses."""

    def evaluate(self, script: str) -> Any:
        """Return the value of a script in the page."""
        return self.tab.evaluate(script)


OpenPage = Callable[..., OpenedPage]


@contextmanager
def open_pages(browser: Browser) -> Iterator[OpenPage]:
    """Yield a function that opens a file and waits until each chart is drawn or has failed; close the pages at exit."""
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
