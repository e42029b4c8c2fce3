"""The files that a report writes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from peftbench.cli.app import app
from peftbench.errors import RecordError
from peftbench.record import find_records
from peftbench.report import writer
from peftbench.report.page.content import UnfinishedRun
from peftbench.report.writer import PAGE_FILE, RESULTS_FILE, write_report
from peftbench.run_dir.refusal import Refusal, write_refusal
from tests.helpers.records import damage_records
from tests.unit.report.page.pages import SHIPPED, load_shipped_records
from tests.unit.report.records import build_record

REPORT_FILES = {PAGE_FILE, RESULTS_FILE, "results.csv", "results.json", "results.tex"}


def run_peftbench(*arguments: str, cwd: Path) -> Result:
    """Run ``peftbench`` with these arguments in this process and return its output and exit code."""
    with contextlib.chdir(cwd):
        return CliRunner().invoke(app, arguments)


def test_report_writes_all_formats(tmp_path: Path) -> None:
    """Write page, Markdown, CSV, JSON and LaTeX, with the same summary in Markdown and JSON."""
    assert write_report(load_shipped_records("demo"), tmp_path, "demo").page_path == tmp_path / PAGE_FILE
    assert {path.name for path in tmp_path.iterdir()} == REPORT_FILES
    markdown = (tmp_path / RESULTS_FILE).read_text(encoding="utf-8")
    assert markdown.startswith("# demo\n\n- ")
    sentence = markdown.splitlines()[2].removeprefix("- ")
    assert sentence in (tmp_path / "results.json").read_text(encoding="utf-8")


def test_command_prints_the_path_of_the_page(tmp_path: Path) -> None:
    """Write the page to the path of --html, and print this path last."""
    folder = tmp_path / "demo"
    for path, run_record in load_shipped_records("demo").items():
        run_record.write(folder / path.parent.name)
    command = [
        sys.executable,
        "-m",
        "peftbench",
        "report",
        "demo",
        "--html",
        "here/page.html",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "report: here/page.html"
    page = (tmp_path / "here" / "page.html").read_text(encoding="utf-8")
    assert " demo/lora/record.json ../lora.json\n" in page
    assert {path.name for path in folder.iterdir() if path.is_file()} == REPORT_FILES - {PAGE_FILE}


def test_page_lists_finished_and_unfinished_runs(tmp_path: Path) -> None:
    """Write the page of two unfinished runs, then write it again after the first run ended."""
    for name in ("first", "second"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "recipe.yaml").write_text("name: x\n", encoding="utf-8")
    result = run_peftbench("report", "out", cwd=tmp_path)
    assert result.exit_code == 0, result.stderr
    page = (tmp_path / "out" / PAGE_FILE).read_text(encoding="utf-8")
    assert "Unfinished runs" in page
    assert ">second<" in page
    build_record("first", "lora", 10).write(tmp_path / "out" / "first")
    assert run_peftbench("report", "out", cwd=tmp_path).exit_code == 0
    page = (tmp_path / "out" / PAGE_FILE).read_text(encoding="utf-8")
    assert ">second</th><td>waiting</td>" in page
    assert ">first</th><td>" not in page


def test_folder_without_runs_is_refused(tmp_path: Path) -> None:
    """Print one sentence and write nothing to the folder."""
    (tmp_path / "empty").mkdir()
    result = run_peftbench("report", "empty", cwd=tmp_path)
    assert result.exit_code == 60
    assert result.stderr.count("\n") == 1
    assert list((tmp_path / "empty").iterdir()) == []


def test_unfinished_runs_are_escaped(tmp_path: Path) -> None:
    """Escape the name and the log line of an unfinished run."""
    rows = [UnfinishedRun("<b>x</b>", "gone", "<script>1</script>")]
    text = write_report({}, tmp_path, "t", unfinished_runs=rows).page_path.read_text(encoding="utf-8")
    assert "<b>x</b>" not in text
    assert "<script>1</script>" not in text


def test_unreadable_record_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note names it, the page lists it, and the other runs are shown; status has its state."""
    monkeypatch.chdir(tmp_path)
    build_record("first", "lora", 10).write(tmp_path / "out" / "first")
    reasons = damage_records(tmp_path / "out")
    result = CliRunner().invoke(app, ["report", "out"])
    assert result.exit_code == 0, result.stderr
    page = (tmp_path / "out" / PAGE_FILE).read_text(encoding="utf-8")
    assert result.stderr.count("note: ") == len(reasons) == page.count("<td>unreadable</td>")
    for name in reasons:
        assert f"note: out/{name}/record.json" in result.stderr
        assert f"- unfinished: {name} (unreadable): out/{name}/record.json" in result.stdout
    assert "first" in result.stdout
    status = CliRunner().invoke(app, ["status", "out"])
    assert status.exit_code == 0
    assert f"{len(reasons)} unreadable" in status.stdout
    table = CliRunner().invoke(app, ["report", "out", "--group-by", "train.seed"])
    assert (table.exit_code, table.stderr.count("note: ")) == (0, len(reasons))


def test_folder_with_unreadable_records_only_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the first file; with a run that waits there is a page."""
    monkeypatch.chdir(tmp_path)
    reasons = damage_records(tmp_path / "out")
    result = CliRunner().invoke(app, ["report", "out"])
    assert result.exit_code == RecordError.exit_code
    assert result.stderr.startswith("error: no readable record.json below out: out/binary/record.json is not a record")
    assert f"(and {len(reasons) - 1} more)" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out" / PAGE_FILE).exists()
    (tmp_path / "out" / "later").mkdir()
    (tmp_path / "out" / "later" / "recipe.yaml").touch()
    assert CliRunner().invoke(app, ["report", "out"]).exit_code == 0
    assert "<td>waiting</td>" in (tmp_path / "out" / PAGE_FILE).read_text(encoding="utf-8")


def test_refused_run_is_in_every_report(tmp_path: Path) -> None:
    """The terminal, RESULTS.md and the page have the state and the reason of a run that was refused."""
    build_record("first", "lora", 10).write(tmp_path / "out" / "first")
    folder = tmp_path / "out" / "second"
    folder.mkdir()
    (folder / "recipe.yaml").touch()
    write_refusal(folder, Refusal(error="folder 'no/such/base' does not exist"))
    result = run_peftbench("report", "out", cwd=tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "- unfinished: second (refused): folder 'no/such/base' does not exist\n" in result.stdout
    markdown = (tmp_path / "out" / RESULTS_FILE).read_text(encoding="utf-8")
    assert "## Unfinished runs\n\n- second (refused): folder " in markdown
    page = (tmp_path / "out" / PAGE_FILE).read_text(encoding="utf-8")
    assert ">second</th><td>refused</td><td>folder &#39;no/such/base&#39; does not exist</td>" in page


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_records_have_a_summary(name: str, tmp_path: Path) -> None:
    """Check that the summary has sentences and that none is empty."""
    summary = write_report(find_records(SHIPPED[name]), tmp_path, name).summary
    assert summary
    assert all(sentence.strip() for sentence in summary)


def test_no_file_is_written_if_the_page_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write no new table next to an older page."""

    def raise_error(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(writer, "build_page_data", raise_error)
    with pytest.raises(ZeroDivisionError):
        write_report({tmp_path / "a" / "record.json": build_record("a", "lora", 1)}, tmp_path, "t")
    assert list(tmp_path.iterdir()) == []


def test_report_of_absolute_path_has_relative_paths(tmp_path: Path) -> None:
    """Write paths below the current directory as relative paths."""
    build_record("first", "lora", 10).write(tmp_path / "out" / "first")
    assert run_peftbench("report", str(tmp_path / "out"), cwd=tmp_path).exit_code == 0
    for path in (tmp_path / "out").glob("*.*"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--html p.html --update-file p.md", "--html has no effect with --update-file, which writes no page"),
        ("--html p.html --group-by train.seed", "--html has no effect with --group-by, which writes no page"),
        ("--marker x --group-by train.seed", "--marker names a section of a file; give the file with --update-file"),
    ],
)
def test_option_without_effect_is_refused(arguments: str, message: str, tmp_path: Path) -> None:
    """Refuse the option in one sentence, and write nothing."""
    build_record("first", "lora", 10).write(tmp_path / "out" / "first")
    result = run_peftbench("report", "out", *arguments.split(), cwd=tmp_path)
    assert result.exit_code == 13
    assert message in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first"]


@pytest.mark.parametrize(
    "arguments", ["report out --group-by train.seed", "report out --update-file p.md", "compare out out"]
)
def test_chart_libraries_are_imported_only_for_a_page(arguments: str, tmp_path: Path) -> None:
    """Check that commands without a page import neither altair nor jinja2 nor vl_convert."""
    build_record("first", "lora", 10).write(tmp_path / "out" / "first")
    (tmp_path / "p.md").write_text("<!-- report:table -->\n<!-- end of report:table -->\n", encoding="utf-8")
    code = (
        "import sys\nfrom peftbench.cli.app import app\napp(sys.argv[1:], standalone_mode=False)\n"
        "sys.exit(bool({'altair', 'jinja2', 'vl_convert'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *arguments.split()]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
