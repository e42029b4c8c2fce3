"""The report benchmark with few runs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.helpers.paths import REPOSITORY

FOLDER = REPOSITORY / "benchmarks" / "report_page"


@pytest.mark.slow
def test_report_time_is_printed() -> None:
    """The script prints the number of records and the time of the report."""
    command = [sys.executable, str(FOLDER / "pages.py"), str(REPOSITORY / "docs" / "results" / "demo")]
    done = subprocess.run(
        [*command, "--runs", "12", "--repeats", "1"], capture_output=True, text=True, check=True, timeout=120
    )
    first, second, _ = done.stdout.splitlines()
    assert first.startswith("12 records, ")
    assert re.fullmatch(r"peftbench report: \d+\.\d s, median of 1 \(\S+ to \S+\)", second)


def test_readme_time_is_within_limit() -> None:
    """The README's time for a thousand runs is below ten seconds."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    match = re.search(r"^peftbench report: (\d+\.\d) s", text, re.MULTILINE)
    assert match is not None
    assert float(match[1]) < 10
    assert "1,000 records" in text
