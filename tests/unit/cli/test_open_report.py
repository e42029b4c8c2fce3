"""The page is opened on request, and its path is a link on a terminal."""

from __future__ import annotations

import shutil
import webbrowser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peftbench.cli.app import app
from peftbench.cli.report_actions import format_link
from tests.helpers.paths import REPOSITORY


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Return a folder with finished runs."""
    return Path(shutil.copytree(REPOSITORY / "docs" / "results" / "demo_budget", tmp_path / "results"))


@pytest.mark.parametrize(("has_browser", "exit_code"), [(True, 0), (False, 50)])
def test_page_is_opened_in_the_browser(
    has_browser: bool, exit_code: int, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a browser the page is written, and one sentence names the reason."""
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or has_browser)  # type: ignore[func-returns-value]
    result = CliRunner().invoke(app, ["report", str(results), "--open"])
    assert result.exit_code == exit_code
    assert opened == [(results / "report.html").resolve().as_uri()]
    assert (results / "report.html").exists()
    assert ("no browser was found" in result.stderr) != has_browser


def test_page_is_not_opened_without_the_option(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script gets the path as the last line."""
    monkeypatch.setattr(webbrowser, "open", lambda _: pytest.fail("opened"))
    result = CliRunner().invoke(app, ["report", str(results)])
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == f"report: {results / 'report.html'}"


def test_option_without_a_page_is_refused(results: Path) -> None:
    """--group-by writes no page."""
    result = CliRunner().invoke(app, ["report", str(results), "--open", "--group-by", "train.seed"])
    assert result.exit_code == 13
    assert "--open has no effect with --group-by" in result.stderr


def test_path_is_a_link_on_a_terminal(tmp_path: Path) -> None:
    """The address is absolute, and the text is the path as given."""
    path = Path("runs") / "a b" / "report.html"
    link = format_link(path, is_terminal=True)
    assert path.resolve().as_uri() in link
    assert link.endswith(f"{path}\x1b]8;;\x1b\\")
    assert format_link(path, is_terminal=False) == str(path)
