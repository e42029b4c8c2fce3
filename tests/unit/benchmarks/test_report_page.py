"""The benchmark of the page of many runs, on few."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.helpers.paths import REPOSITORY

FOLDER = REPOSITORY / "benchmarks" / "report_page"


def test_it_measures_the_page() -> None:
    """It says how many records there were, and how long their report took."""
    command = [sys.executable, str(FOLDER / "pages.py"), str(REPOSITORY / "docs" / "results" / "demo")]
    done = subprocess.run(
        [*command, "--runs", "12", "--repeats", "1"], capture_output=True, text=True, check=True, timeout=120
    )
    first, second, _ = done.stdout.splitlines()
    assert first.startswith("12 records, ")
    assert re.fullmatch(r"peftbench report: \d+\.\d s, median of 1 \(\S+ to \S+\)", second)


def test_the_readme_has_figures() -> None:
    """Of the command that it names, and below the ten seconds that a thousand runs may take."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^peftbench report: (\d+\.\d) s", text, re.MULTILINE)
    assert found is not None
    assert float(found[1]) < 10
    assert "1,000 records" in text
