"""A page in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

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
