"""The picture of the page in README.md: ``python -m tests.unit.report.page.picture``, or make picture.

It needs Chromium. README.md keeps the digest of what the picture was made of, by which a test knows an old one.
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


def digest() -> str:
    """Of the records and of what gives the page its looks."""
    report = REPOSITORY / "src" / "peftbench" / "report"
    looks = [
        *(report / "page" / name for name in ("page.html.jinja", "page.css", "page.js", "charts.py", "series.py")),
        *(report / name for name in ("summary.py", "tables/columns.py")),
    ]
    found = hashlib.blake2b(digest_size=8)
    for path in [*sorted(RECORDS.rglob(RECORD_FILE)), *looks]:
        found.update(path.read_bytes())
    return found.hexdigest()


def block() -> str:
    """What README.md has between its markers."""
    return f"[![{_TEXT}](docs/report.png)](docs/guides/report.md)\n\n<!-- made of {digest()} -->"


def take() -> None:
    """Make the page, look at it, and put the picture into README.md."""
    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium")
    if browser is None:
        sys.exit("there is no chromium on the path; apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = write_report(find_records(RECORDS), Path(folder), "demo").page_path
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        window = chromium.new_page(viewport={"width": SIZE[0], "height": SIZE[1]}, color_scheme="light")
        window.goto(page.as_uri())
        window.wait_for_function("[...document.querySelectorAll('[data-chart]')].every(b => b.dataset.drawn)")
        window.screenshot(path=PICTURE)
        chromium.close()
    insert_block(block(), REPOSITORY / "README.md", "picture")


if __name__ == "__main__":
    take()
