"""Screenshot of the page for README.md: ``python -m tests.unit.report.page.picture``, or ``make picture``.

It needs Chromium. README.md has a digest of everything the picture shows, so that a test can detect an old picture.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

from peftbench.record import RECORD_FILE, find_records
from peftbench.report.tables.table import insert_block
from peftbench.report.writer import write_report
from tests.helpers.paths import REPOSITORY

RECORDS = REPOSITORY / "docs" / "results" / "demo"
PICTURE = REPOSITORY / "docs" / "report.png"
SIZE = (1280, 1500)
_TEXT = (
    "The page of the demo: summary, then ROUGE-L against memory, time and FLOPs with the Pareto front, then the table"
)


def compute_digest() -> str:
    """Return a digest of the records and of the sources that define the page's appearance."""
    report = REPOSITORY / "src" / "peftbench" / "report"
    sources = [
        *(report / "page" / name for name in ("page.html.jinja", "page.css", "page.js", "charts.py", "series.py")),
        *(report / name for name in ("summary.py", "tables/columns.py")),
    ]
    hasher = hashlib.blake2b(digest_size=8)
    for path in [*sorted(RECORDS.rglob(RECORD_FILE)), *sources]:
        hasher.update(path.read_bytes())
    return hasher.hexdigest()


def render_block() -> str:
    """Return the content of the "picture" block of README.md."""
    return f"[![{_TEXT}](docs/report.png)](docs/guides/report.md)\n\n<!-- made of {compute_digest()} -->"


def take_picture() -> None:
    """Write the page, take a screenshot and update README.md."""
    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium")
    if browser is None:
        sys.exit("chromium is not on PATH; run apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = write_report(find_records(RECORDS), Path(folder), "demo").page_path
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        tab = chromium.new_page(viewport={"width": SIZE[0], "height": SIZE[1]}, color_scheme="light")
        tab.goto(page.as_uri())
        tab.wait_for_function("[...document.querySelectorAll('[data-chart]')].every(b => b.dataset.drawn)")
        tab.screenshot(path=PICTURE)
        chromium.close()
    insert_block(render_block(), REPOSITORY / "README.md", "picture")


if __name__ == "__main__":
    take_picture()
