"""What a report writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftbench.record import find_records
from peftbench.report import writer
from peftbench.report.page.content import UnfinishedRun
from peftbench.report.writer import PAGE_FILE, RESULTS_FILE, write_report
from tests.unit.report.page.pages import SHIPPED, shipped
from tests.unit.report.records import record

WRITTEN = {PAGE_FILE, RESULTS_FILE, "results.csv", "results.json", "results.tex"}


def peftbench(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command of ``peftbench``, run to its end."""
    command = [sys.executable, "-c", "from peftbench.cli.app import main; main()", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_everything_is_written_and_said(tmp_path: Path) -> None:
    """Page, Markdown, CSV, JSON and LaTeX, all with the same words."""
    assert write_report(shipped("demo"), tmp_path, "demo").page_path == tmp_path / PAGE_FILE
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN
    markdown = (tmp_path / RESULTS_FILE).read_text(encoding="utf-8")
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
    assert " demo/lora/record.json ../lora.json\n" in page
    assert {path.name for path in folder.iterdir() if path.is_file()} == WRITTEN - {PAGE_FILE}


def test_a_page_of_what_is_there(tmp_path: Path) -> None:
    """While runs wait, the page has those that ended, and names the others; with none at all it names them still."""
    for name in ("first", "second"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "recipe.yaml").write_text("name: x\n", encoding="utf-8")
    found = peftbench("report", "out", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    page = (tmp_path / "out" / PAGE_FILE).read_text(encoding="utf-8")
    assert "Unfinished runs" in page
    assert ">second<" in page
    record("first", "lora", 10).write(tmp_path / "out" / "first")
    assert peftbench("report", "out", cwd=tmp_path).returncode == 0
    page = (tmp_path / "out" / PAGE_FILE).read_text(encoding="utf-8")
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
    rows = [UnfinishedRun("<b>x</b>", "gone", "<script>1</script>")]
    text = write_report({}, tmp_path, "t", unfinished_runs=rows).page_path.read_text(encoding="utf-8")
    assert "<b>x</b>" not in text
    assert "<script>1</script>" not in text


@pytest.mark.parametrize("name", SHIPPED)
def test_a_report_of_shipped_records_says_something(name: str, tmp_path: Path) -> None:
    """Of records of any age there are words."""
    said = write_report(find_records(SHIPPED[name]), tmp_path, name).summary
    assert said
    assert all(sentence.strip() for sentence in said)


def test_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the page cannot be made, nothing is written: no table beside an older page."""

    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(writer, "build_page_data", fails)
    with pytest.raises(ZeroDivisionError):
        write_report({tmp_path / "a" / "record.json": record("a", "lora", 1)}, tmp_path, "t")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_given_as_an_absolute_path_tells_no_place(tmp_path: Path) -> None:
    """What lies below the current directory is named as seen from there."""
    record("first", "lora", 10).write(tmp_path / "out" / "first")
    assert peftbench("report", str(tmp_path / "out"), cwd=tmp_path).returncode == 0
    for path in (tmp_path / "out").glob("*.*"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--html p.html --update-file p.md", "--html has no effect with --update-file, which writes no page"),
        ("--html p.html --group-by train.seed", "--html has no effect with --group-by, which writes no page"),
        ("--marker x --group-by train.seed", "--marker names a section of a file; give the file with --update-file"),
    ],
)
def test_nothing_is_ignored(arguments: str, sentence: str, tmp_path: Path) -> None:
    """What would change nothing is refused in one sentence, and nothing is written."""
    record("first", "lora", 10).write(tmp_path / "out" / "first")
    found = peftbench("report", "out", *arguments.split(), cwd=tmp_path)
    assert found.returncode == 13
    assert sentence in found.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first"]


@pytest.mark.parametrize(
    "arguments", ["report out --group-by train.seed", "report out --update-file p.md", "compare out out"]
)
def test_charts_are_loaded_for_a_page_alone(arguments: str, tmp_path: Path) -> None:
    """What makes no page waits for no library of charts."""
    record("first", "lora", 10).write(tmp_path / "out" / "first")
    (tmp_path / "p.md").write_text("<!-- report:table -->\n<!-- end of report:table -->\n", encoding="utf-8")
    code = (
        "import sys\nfrom peftbench.cli.app import app\napp(sys.argv[1:], standalone_mode=False)\n"
        "sys.exit(bool({'altair', 'jinja2', 'vl_convert'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
