"""Measure how long the report of many runs takes to build and to open, with copies of a suite's records.

    python benchmarks/report_page/pages.py docs/results/demo --runs 1000

Each copy has its own name, seed and learning rate, so that no work is shared. Writing records is not timed. Timed are
``peftbench report`` in its own process and, if playwright and Chromium are installed, the browser until every chart is
drawn and a click that sorts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from peftbench.record import RunRecord, read_records

_DRAWN = "[...document.querySelectorAll('[data-chart]')].every(b => b.dataset.drawn)"


def write_copies(records: Sequence[RunRecord], count: int, folder: Path, seeds: int) -> None:
    """Write ``count`` copies of ``records`` to ``folder``, in groups of ``seeds`` runs."""
    for index in range(count):
        one = records[index % len(records)]
        recipe = json.loads(json.dumps(one.recipe))
        batch = index // len(records)
        recipe["name"] = f"{one.name}-{index}"
        recipe["train"]["seed"] = batch % seeds
        if "learning_rate" in recipe.get("optimizer", {}):
            recipe["optimizer"]["learning_rate"] = 1e-4 * (1 + batch // seeds)
        one.model_copy(update={"name": recipe["name"], "recipe": recipe}).write(folder / recipe["name"])


def time_report(folder: Path) -> float:
    """Return the seconds of ``peftbench report``, from process start to end."""
    command = [sys.executable, "-c", "from peftbench.cli.app import main; main()", "report", str(folder)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    return time.perf_counter() - start


def time_browser(page: Path) -> tuple[float, float] | None:
    """Return seconds until every chart is drawn, and to sort by the fourth column; None without a browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    path = shutil.which("chromium")
    if path is None:
        return None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        window = browser.new_page()
        start = time.perf_counter()
        window.goto(page.as_uri())
        window.wait_for_function(_DRAWN)
        drawn = time.perf_counter() - start
        start = time.perf_counter()
        window.locator("#runs thead button").nth(3).click()
        window.wait_for_selector("#runs th[aria-sort=ascending]")
        sort = time.perf_counter() - start
        browser.close()
    return drawn, sort


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="folder of the records to copy")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5, help="runs per group")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_copies(read_records(args.records), args.runs, folder, args.seeds)
        size = sum(path.stat().st_size for path in folder.rglob("record.json"))
        seconds = [time_report(folder) for _ in range(args.repeats)]
        page = folder / "report.html"
        print(f"{args.runs:,} records, {size / 2**20:,.0f} MiB; the page has {page.stat().st_size / 2**20:.1f} MiB")
        print(
            f"peftbench report: {statistics.median(seconds):.1f} s, median of {args.repeats} ({min(seconds):.1f} to "
            f"{max(seconds):.1f})"
        )
        timings = time_browser(page)
        if timings is None:
            print("not opened: playwright or chromium is not installed")
        else:
            print(f"in Chromium: {timings[0]:.1f} s until every chart is drawn, {timings[1]:.2f} s to sort")


if __name__ == "__main__":
    main()
