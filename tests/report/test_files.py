"""What a report writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peftbench.record import find_records
from peftbench.report.files import PAGE, RESULTS, write_report
from peftbench.report.page.content import Unfinished
from tests.report.page.pages import SHIPPED, shipped
from tests.report.records import record

WRITTEN = {PAGE, RESULTS, "results.csv", "results.json", "results.tex"}


def peftbench(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command of ``peftbench``, run to its end."""
    command = [sys.executable, "-c", "from peftbench.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_everything_is_written_and_said(tmp_path: Path) -> None:
    """Page, Markdown, CSV, JSON and LaTeX, all with the same words."""
    assert write_report(shipped("demo"), tmp_path, "demo").page == tmp_path / PAGE
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN
    markdown = (tmp_path / RESULTS).read_text(encoding="utf-8")
    assert markdown.startswith("# demo\n\n- ")
    sentence = markdown.splitlines()[2].removeprefix("- ")
    assert sentence in (tmp_path / "results.json").read_text(encoding="utf-8")


def test_the_command_names_the_page(tmp_path: Path) -> None:
    """The last line of ``peftbench report`` is where the page is, which --html says."""
    folder = tmp_path / "demo"
    for path, one in shipped("demo").items():
        one.write(folder / path.parent.name)
    found = peftbench("report", "demo", "--html", "here/page.html", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "report: here/page.html"
    page = (tmp_path / "here" / "page.html").read_text(encoding="utf-8")
    assert "--config demo/lora/record.json" in page
    assert {path.name for path in folder.iterdir() if path.is_file()} == WRITTEN - {PAGE}


def test_a_page_of_what_is_there(tmp_path: Path) -> None:
    """While runs wait, the page has those that ended, and names the others; with none at all it names them still."""
    for name in ("first", "second"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "recipe.yaml").write_text("name: x\n", encoding="utf-8")
    found = peftbench("report", "out", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert "Not finished" in page
    assert ">second<" in page
    record("first", "lora", 10).write(tmp_path / "out" / "first")
    assert peftbench("report", "out", cwd=tmp_path).returncode == 0
    page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert ">second</th><td>waiting</td>" in page
    assert ">first</th><td>" not in page


def test_nothing_at_all_is_a_mistake(tmp_path: Path) -> None:
    """A folder without any run is told in one sentence, and nothing is written to it."""
    (tmp_path / "empty").mkdir()
    found = peftbench("report", "empty", cwd=tmp_path)
    assert found.returncode == 60
    assert found.stderr.count("\n") == 1
    assert list((tmp_path / "empty").iterdir()) == []


def test_unfinished_runs_are_escaped(tmp_path: Path) -> None:
    """What a log said of a run may be anything."""
    rows = [Unfinished("<b>x</b>", "gone", "<script>1</script>")]
    text = write_report({}, tmp_path, "t", unfinished=rows).page.read_text(encoding="utf-8")
    assert "<b>x</b>" not in text
    assert "<script>1</script>" not in text


@pytest.mark.parametrize("name", SHIPPED)
def test_a_report_of_shipped_records_says_something(name: str, tmp_path: Path) -> None:
    """Of records of any age there are words."""
    write_report(find_records(SHIPPED[name]), tmp_path, name)
    assert "\n- " in (tmp_path / RESULTS).read_text(encoding="utf-8")
