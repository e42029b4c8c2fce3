"""The page of two suites, in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftbench.record import Device
from peftbench.report.diff.compute import diff_suites
from peftbench.report.page.build import render_diff_page
from tests.unit.report.page.conftest import Open
from tests.unit.report.page.test_in_browser import HOSTILE
from tests.unit.report.records import judged, record


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_shows_what_changed(scheme: str, opened: Open, tmp_path: Path) -> None:
    """What fell, what changed in config, and names as they are; no script, no word on the console, no network."""
    before, after = tmp_path / "A", tmp_path / "B"
    record(HOSTILE, "lora", 10, loss=3.0).write(before / "a")
    record(HOSTILE, "lora", 10, loss=4.0, global_batch_size=8, git_commit=HOSTILE).write(after / "a")
    page = tmp_path / "page.html"
    page.write_text(render_diff_page(diff_suites(before, after)), encoding="utf-8")
    found = opened(page, color_scheme=scheme)
    assert found.said == []
    assert found.asked == [page.as_uri()]
    assert found.see("window.hacked") is None
    assert found.see("document.querySelectorAll('script, img').length") == 0
    row = found.page.locator(".metric-diff tbody tr").inner_text()
    assert HOSTILE in row
    assert "held_out_loss" in row
    assert "regressed by more than 5%" in row
    config = found.page.locator("section", has_text="Changed settings").inner_text()
    assert "train.global_batch_size" in config
    assert "16" in config
    assert found.see("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_an_interval_is_told_of_once_and_where_there_is_one(opened: Open, tmp_path: Path) -> None:
    """Of figures without an interval the page says nothing of brackets; of one with it, once."""

    def words(name: str, *losses: float) -> str:
        for side, loss in zip(("A", "B"), losses, strict=True):
            one = judged("a", "lora", None, losses=[loss + step / 100 for step in range(30)], labelled=(1,) * 30)
            (record("a", "lora", 10, loss=loss) if name == "plain" else one).write(tmp_path / name / side / "a")
        page = tmp_path / f"{name}.html"
        page.write_text(render_diff_page(diff_suites(tmp_path / name / "A", tmp_path / name / "B")), encoding="utf-8")
        found: str = opened(page).page.locator("body").inner_text()
        return found

    assert "in brackets" not in words("plain", 1.0, 2.0).lower()
    assert words("judged", 1.0, 2.0).lower().count("in brackets") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_is_accessible(scheme: str, opened: Open, tmp_path: Path) -> None:
    """Axe finds no violation on the page of two suites either."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    record("a", "lora", 10, loss=3.0).write(tmp_path / "A" / "a")
    record("a", "lora", 10, loss=4.0, global_batch_size=8).write(tmp_path / "B" / "a")
    page = tmp_path / "page.html"
    page.write_text(render_diff_page(diff_suites(tmp_path / "A", tmp_path / "B")), encoding="utf-8")
    found = axe.Axe().run(opened(page, color_scheme=scheme, bypass_csp=True).page).response
    assert [(one["id"], one["nodes"][0]["html"]) for one in found["violations"]] == []


def test_two_equal_suites(opened: Open, tmp_path: Path) -> None:
    """Nothing changed is said, and there is no table."""
    record("a", "lora", 10).write(tmp_path / "A" / "a")
    page = tmp_path / "page.html"
    page.write_text(render_diff_page(diff_suites(tmp_path / "A", tmp_path / "A")), encoding="utf-8")
    found = opened(page)
    assert "nothing changed" in found.page.locator("main").inner_text()
    assert found.page.locator("table").count() == 0


def test_what_another_device_does_not_tell_has_not_fallen(tmp_path: Path) -> None:
    """Energy that one device tells and the other does not is no fall; on the same device it is."""
    there = {"energy_joules": 10.0}
    record("a", "lora", 10, **there).write(tmp_path / "A" / "a")
    record("a", "lora", 10).write(tmp_path / "same" / "a")
    record("a", "lora", 10, device=Device(type="cpu", name="another", num_processes=1)).write(tmp_path / "other" / "a")
    assert diff_suites(tmp_path / "A", tmp_path / "same").regressed
    other = diff_suites(tmp_path / "A", tmp_path / "other")
    assert not other.regressed
    assert [figure.verdict for figure in other.runs[0].metrics if figure.name == "train_joules"] == ["not_reported"]
