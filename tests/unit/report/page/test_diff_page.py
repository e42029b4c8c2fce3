"""The page that compares two suites, in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftbench.record import Device
from peftbench.report.diff.compute import diff_suites
from peftbench.report.page.build import render_diff_page
from tests.helpers.browser import OpenPage
from tests.unit.report.page.test_in_browser import HOSTILE
from tests.unit.report.records import build_judged_record, build_record


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_diff_page_shows_changes(scheme: str, open_page: OpenPage, tmp_path: Path) -> None:
    """Check regressed metrics, changed settings and escaped names; no script, console message or network request."""
    before, after = tmp_path / "A", tmp_path / "B"
    build_record(HOSTILE, "lora", 10, loss=3.0).write(before / "a")
    build_record(HOSTILE, "lora", 10, loss=4.0, global_batch_size=8, git_commit=HOSTILE).write(after / "a")
    path = tmp_path / "page.html"
    path.write_text(render_diff_page(diff_suites(before, after)), encoding="utf-8")
    page = open_page(path, color_scheme=scheme)
    assert page.console == []
    assert page.requests == [path.as_uri()]
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('script, img').length") == 0
    row = page.tab.locator(".metric-diff tbody tr").inner_text()
    assert HOSTILE in row
    assert "held_out_loss" in row
    assert "regressed by more than 5%" in row
    config = page.tab.locator("section", has_text="Changed settings").inner_text()
    assert "train.global_batch_size" in config
    assert "16" in config
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_interval_notation_is_explained_once_if_used(open_page: OpenPage, tmp_path: Path) -> None:
    """Check that a page without intervals does not mention brackets, and that a page with one does once."""

    def page_text(name: str, *losses: float) -> str:
        for side, loss in zip(("A", "B"), losses, strict=True):
            with_interval = build_judged_record(
                "a", "lora", None, losses=[loss + step / 100 for step in range(30)], labeled=(1,) * 30
            )
            (build_record("a", "lora", 10, loss=loss) if name == "plain" else with_interval).write(
                tmp_path / name / side / "a"
            )
        path = tmp_path / f"{name}.html"
        path.write_text(render_diff_page(diff_suites(tmp_path / name / "A", tmp_path / name / "B")), encoding="utf-8")
        text: str = open_page(path).tab.locator("body").inner_text()
        return text

    assert "in brackets" not in page_text("plain", 1.0, 2.0).lower()
    assert page_text("judged", 1.0, 2.0).lower().count("in brackets") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_diff_page_is_accessible(scheme: str, open_page: OpenPage, tmp_path: Path) -> None:
    """Check that axe finds no violation."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    build_record("a", "lora", 10, loss=3.0).write(tmp_path / "A" / "a")
    build_record("a", "lora", 10, loss=4.0, global_batch_size=8).write(tmp_path / "B" / "a")
    path = tmp_path / "page.html"
    path.write_text(render_diff_page(diff_suites(tmp_path / "A", tmp_path / "B")), encoding="utf-8")
    results = axe.Axe().run(open_page(path, color_scheme=scheme, bypass_csp=True).tab).response
    assert [(violation["id"], violation["nodes"][0]["html"]) for violation in results["violations"]] == []


def test_equal_suites_have_no_table(open_page: OpenPage, tmp_path: Path) -> None:
    """Check that the page reports no change."""
    build_record("a", "lora", 10).write(tmp_path / "A" / "a")
    path = tmp_path / "page.html"
    path.write_text(render_diff_page(diff_suites(tmp_path / "A", tmp_path / "A")), encoding="utf-8")
    page = open_page(path)
    assert "nothing changed" in page.tab.locator("main").inner_text()
    assert page.tab.locator("table").count() == 0


def test_metric_that_another_device_does_not_report_is_not_a_regression(tmp_path: Path) -> None:
    """Check that missing energy is a regression only if both runs used the same device."""
    energy = {"energy_joules": 10.0}
    build_record("a", "lora", 10, **energy).write(tmp_path / "A" / "a")
    build_record("a", "lora", 10).write(tmp_path / "same" / "a")
    build_record("a", "lora", 10, device=Device(type="cpu", name="another", num_processes=1)).write(
        tmp_path / "other_device" / "a"
    )
    assert diff_suites(tmp_path / "A", tmp_path / "same").regressed
    other_device = diff_suites(tmp_path / "A", tmp_path / "other_device")
    assert not other_device.regressed
    assert [metric.verdict for metric in other_device.runs[0].metrics if metric.name == "train_joules"] == [
        "not_reported"
    ]
