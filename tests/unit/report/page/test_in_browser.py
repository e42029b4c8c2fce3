"""The page in a real browser, opened from a file without a network."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peftbench.record import (
    Flops,
    Interval,
    Memory,
    Outcome,
    ParameterCounts,
    Quality,
    RunRecord,
    Sample,
    StateBytes,
    read_records,
    train_peak_bytes,
)
from tests.helpers.browser import OpenedPage, OpenPage, open_pages
from tests.helpers.scores import build_scores
from tests.helpers.sweeps import mark_others_slow
from tests.unit.report.page.pages import SHIPPED, load_shipped_records, write_page
from tests.unit.report.records import build_record

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SIZES = {"screen": (1440, 900), "tablet": (820, 1180), "phone": (375, 700)}
FAST_WINDOWS = {("screen", "light"), ("phone", "dark")}
WINDOWS = [
    pytest.param(size, scheme, id=f"{name}-{scheme}", marks=() if (name, scheme) in FAST_WINDOWS else pytest.mark.slow)
    for name, size in SIZES.items()
    for scheme in ("light", "dark")
]
"""Viewports of a screen, a tablet and a phone."""


@pytest.fixture(scope="module")
def demo_page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenedPage]:
    """Yield the demo's page at the default size. It is opened once: a test must not change what others read."""
    with open_pages(browser) as open_page:
        yield open_page(write_page(load_shipped_records("demo"), tmp_path_factory.mktemp("demo")))


def header_selector(title: str) -> str:
    """Return the selector of a column's header."""
    return f"#runs thead th[data-column='{title}']"


@pytest.mark.parametrize(("size", "scheme"), WINDOWS)
def test_page_opens_without_console_messages(
    size: tuple[int, int], scheme: str, open_page: OpenPage, tmp_path: Path
) -> None:
    """Check that the page requests nothing else, draws every chart, and has no element wider than the window."""
    path = write_page(load_shipped_records("demo"), tmp_path)
    page = open_page(path, width=size[0], height=size[1], color_scheme=scheme)
    assert page.console == []
    assert page.requests == [path.resolve().as_uri()]
    drawn = page.evaluate("[...document.querySelectorAll('[data-chart]')].map(b => [b.dataset.drawn, b.innerText])")
    assert len(drawn) >= 6
    assert all(state == "yes" for state, _ in drawn)
    marks = page.evaluate(
        "[...document.querySelectorAll('[data-chart] svg')].map(s => s.querySelectorAll('path').length)"
    )
    assert len(marks) == len(drawn)
    assert min(marks) >= 5
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    too_wide = page.evaluate(
        "[...document.querySelectorAll('.chart')].filter(b => b.querySelector('svg').getBoundingClientRect().width "
        "> b.getBoundingClientRect().width + 1).length"
    )
    assert too_wide == 0


def test_chart_colors_follow_the_theme(open_page: OpenPage, tmp_path: Path) -> None:
    """Check that chart text has the page's text color in light and dark, and is black in print."""
    path = write_page(load_shipped_records("demo"), tmp_path)
    ink = "getComputedStyle(document.querySelector('.chart svg text')).fill"
    page_by_scheme = {scheme: open_page(path, color_scheme=scheme) for scheme in ("light", "dark")}
    ink_by_scheme = {scheme: page.evaluate(ink) for scheme, page in page_by_scheme.items()}
    assert ink_by_scheme == {"light": "rgb(27, 27, 31)", "dark": "rgb(233, 233, 238)"}
    printed = page_by_scheme["dark"]
    printed.tab.emulate_media(media="print")
    assert printed.evaluate(ink) == "rgb(0, 0, 0)"
    assert printed.tab.pdf().startswith(b"%PDF")


def test_table_sorts_by_value(demo_page: OpenedPage) -> None:
    """Check numeric order in both directions, by mouse and by keyboard; unknown values stay last."""
    records = load_shipped_records("demo")
    page = demo_page
    peaks = {record.name: peak for record in records.values() if (peak := train_peak_bytes(record)) is not None}
    smallest_first = sorted(peaks, key=peaks.__getitem__)
    assert len(smallest_first) == 4

    def run_order() -> list[str]:
        names: list[str] = page.evaluate("[...document.querySelectorAll('#runs tbody th')].map(h => h.textContent)")
        return names

    button = page.tab.locator(f"{header_selector('peak mem (MiB)')} button")
    button.click()
    assert run_order() == [*smallest_first, "lead_1", "zero_shot"]
    assert page.tab.locator(header_selector("peak mem (MiB)")).get_attribute("aria-sort") == "ascending"
    button.press("Enter")
    assert run_order() == [*reversed(smallest_first), "lead_1", "zero_shot"]
    assert page.tab.locator(header_selector("peak mem (MiB)")).get_attribute("aria-sort") == "descending"
    page.tab.locator(f"{header_selector('run')} button").press("Space")
    assert run_order() == sorted(run_order())
    assert page.tab.locator("#runs th[aria-sort=none]").count() == page.tab.locator("#runs thead th").count() - 1


def test_column_header_shows_its_definition(open_page: OpenPage, tmp_path: Path) -> None:
    """Check that the tooltip opens on hover and focus, fits the window, closes on Escape and describes its button."""
    page = open_page(write_page(load_shipped_records("demo"), tmp_path), width=375, height=700)
    tooltip = page.tab.locator(f"{header_selector('held-out loss')} [role=tooltip]")
    assert not tooltip.is_visible()
    page.tab.locator(f"{header_selector('held-out loss')} button").hover()
    assert "cross-entropy" in tooltip.inner_text()
    page.tab.wait_for_timeout(100)
    box = tooltip.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 375
    page.tab.mouse.move(0, 0)
    tooltip.wait_for(state="hidden")
    page.tab.locator(f"{header_selector('run')} button").focus()
    page.tab.keyboard.press("Tab")
    page.tab.keyboard.press("Tab")
    page.tab.keyboard.press("Tab")
    assert tooltip.is_visible()
    page.tab.keyboard.press("Escape")
    assert not tooltip.is_visible()
    described = page.tab.locator(f"{header_selector('held-out loss')} button").get_attribute("aria-describedby")
    assert tooltip.get_attribute("id") == described


def test_chart_point_shows_its_run(demo_page: OpenedPage) -> None:
    """Check the tooltip of a mark, and the label of a mark for screen readers."""
    page = demo_page
    point = page.tab.locator("#chart-quality-mib svg .mark-symbol.role-mark path[aria-label*='full']").first
    label = point.get_attribute("aria-label")
    assert label is not None
    assert "run: full" in label
    point.scroll_into_view_if_needed()
    point.hover(force=True)
    page.tab.wait_for_selector("#vg-tooltip-element.visible")
    assert "full" in page.tab.locator("#vg-tooltip-element").inner_text()


def test_non_finite_value_is_sorted_last(open_page: OpenPage, tmp_path: Path) -> None:
    """Check that a diverged run is last in both directions and causes no console message."""
    diverged = build_record(
        "diverged",
        "lora",
        10,
        loss=float("nan"),
        outcome=Outcome(kind="diverged", step=2),
        step_losses=(1.0, float("inf")),
    )
    rows = [diverged, build_record("a", "full", 1000, loss=2.0), build_record("b", "full", 1000, loss=3.0)]
    page = open_page(write_page({tmp_path / run.name / "record.json": run for run in rows}, tmp_path))
    assert page.console == []
    for first in ("a (full)", "b (full)"):
        page.tab.locator(f"{header_selector('held-out loss')} button").click()
        order = page.evaluate("[...document.querySelectorAll('#runs tbody th')].map(h => h.textContent)")
        assert (order[0], order[-1]) == (first, "diverged (lora)")


def test_numbers_with_an_exponent_are_sorted_by_value(open_page: OpenPage, tmp_path: Path) -> None:
    """Check that 5 of 10,000,000 is below 1 of 1,000, although it has a larger first digit and an exponent."""
    sizes = {"few": (5, 10_000_000), "some": (1, 1000), "half": (1, 2)}
    rows = [
        build_record(name, "lora", 10, parameters=ParameterCounts(trainable=trainable, total=total))
        for name, (trainable, total) in sizes.items()
    ]
    page = open_page(write_page({tmp_path / run.name / "record.json": run for run in rows}, tmp_path))
    page.tab.locator(f"{header_selector('trainable %')} button").click()
    order = page.evaluate("[...document.querySelectorAll('#runs tbody th')].map(h => h.textContent)")
    assert order == ["few (lora)", "some (lora)", "half (lora)"]


def test_long_names_fit_a_phone(open_page: OpenPage, tmp_path: Path) -> None:
    """Check that names of a sweep cause no horizontal scrolling with all details open."""
    page = open_page(write_page(load_shipped_records("demo_rates"), tmp_path), width=375, height=700)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_filter_shows_matching_runs(open_page: OpenPage, tmp_path: Path) -> None:
    """Check that the filter keeps rows that have all of its terms, and that the page shows their number."""
    page = open_page(write_page(load_shipped_records("demo_budget"), tmp_path))
    page.tab.fill("#filter", "FULL oom")
    assert page.tab.locator("#runs tbody tr:visible").count() == 1
    assert page.tab.locator("#count").inner_text() == "1 of 3"
    page.tab.fill("#filter", "")
    assert page.tab.locator("#runs tbody tr:visible").count() == 3


@pytest.mark.parametrize("kind", ["csv", "json", "tex"])
def test_data_can_be_downloaded(kind: str, demo_page: OpenedPage) -> None:
    """Check that a button saves the complete file that the report writes."""
    page = demo_page
    with page.tab.expect_download() as download:
        page.tab.click(f"[data-download={kind}]")
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert download.value.suggested_filename == f"results.{kind}"
    if kind == "csv":
        assert {row["run"] for row in csv.DictReader(io.StringIO(text))} == {
            r.name for r in load_shipped_records("demo").values()
        }
    elif kind == "json":
        assert len(json.loads(text)["runs"]) == len(load_shipped_records("demo"))
    else:
        assert "\\toprule" in text
    assert page.console == []


HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\"'&{{ 7 * 7 }}"


def test_markup_in_records_is_shown_as_text(open_page: OpenPage, tmp_path: Path) -> None:
    """Check that markup in summaries, articles, names, notes and devices does not run."""
    hostile = build_record(
        HOSTILE, "lora", 10, notes=(HOSTILE,), git_commit=HOSTILE, library_versions={HOSTILE: HOSTILE}
    )
    assert hostile.quality is not None
    sample = Sample(id=HOSTILE, prompt=HOSTILE, reference=HOSTILE, generated=HOSTILE)
    hostile = hostile.model_copy(
        update={
            "quality": hostile.quality.model_copy(update={"samples": (sample,)}),
            "step_losses": (3.0, 2.0),
            "step_seconds": (1.0, 1.0),
            "device": hostile.device.model_copy(update={"name": HOSTILE}),
            "memory": {"train": Memory(allocated_bytes=2**20)},
        }
    )
    page = open_page(
        write_page({tmp_path / "hostile" / "record.json": hostile}, tmp_path, title=HOSTILE, summary=[HOSTILE])
    )
    page.tab.wait_for_timeout(300)
    assert page.console == []
    assert len(page.requests) == 1
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert page.evaluate("document.querySelectorAll('script').length") == 4
    assert page.tab.locator("blockquote").inner_text() == HOSTILE
    assert page.tab.locator("td.text").nth(1).inner_text() == HOSTILE
    assert page.tab.title() == f"{HOSTILE} – peftbench"
    mark = page.tab.locator("#chart-quality-mib svg .mark-symbol.role-mark path").first
    mark.hover(force=True)
    page.tab.wait_for_selector("#vg-tooltip-element.visible")
    assert page.evaluate("document.querySelectorAll('#vg-tooltip-element img, #vg-tooltip-element script').length") == 0
    assert page.evaluate("window.hacked") is None


def test_injected_script_is_blocked(open_page: OpenPage, tmp_path: Path) -> None:
    """Check that the content security policy allows only the page's own scripts, by their digests."""
    path = write_page(load_shipped_records("demo"), tmp_path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("</main>", "<script>window.hacked = 1</script></main>"), encoding="utf-8")
    page = open_page(path)
    assert page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in line for line in page.console)


def test_page_without_scripts_has_table_and_notice(open_page: OpenPage, tmp_path: Path) -> None:
    """Check that the table is complete and a notice states what is missing."""
    page = open_page(write_page(load_shipped_records("demo"), tmp_path), java_script_enabled=False)
    assert page.tab.locator("#runs tbody tr").count() == 6
    assert page.tab.locator("noscript").is_visible()


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_page_is_accessible(scheme: str, open_page: OpenPage, tmp_path: Path) -> None:
    """Check that axe, a WCAG checker, finds no violation, e.g. in contrast, labels, heading order or roles."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = open_page(write_page(load_shipped_records("demo"), tmp_path), color_scheme=scheme, bypass_csp=True)
    results = axe.Axe().run(page.tab, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]}).response
    assert [(rule["id"], [node["html"][:200] for node in rule["nodes"]][:3]) for rule in results["violations"]] == []
    assert len(results["passes"]) > 20


def test_run_out_of_memory_is_shown(open_page: OpenPage, tmp_path: Path) -> None:
    """Check the row of the run, its bar with the requested allocation, and the line of the budget."""
    page = open_page(write_page(load_shipped_records("demo_budget"), tmp_path))
    row = page.tab.locator(
        "#runs tbody tr",
        has=page.tab.locator("th", has_text="full (oom)").or_(page.tab.locator("th:text-is('full')")),
    )
    assert "oom at step 2" in row.first.inner_text()
    bars = page.evaluate(
        "[...document.querySelectorAll('#chart-memory [aria-label]')].map(e => e.getAttribute('aria-label'))"
    )
    assert any("requested allocation" in str(bar) for bar in bars)
    assert sum("limited by: budget" in str(bar) and "110" in str(bar) for bar in bars) == 1
    assert "full (oom at step 2)" in page.tab.locator("#trade-offs").inner_text()


def _build_records(count: int) -> dict[Path, RunRecord]:
    """Return records of runs of four methods, each with its own seed and loss curve."""
    kinds = ("full", "last_layer", "lora", "prompt_tuning")
    records = {}
    for index in range(count):
        kind, score = kinds[index % 4], 20 + (index * 37 % 100) / 10
        quality = Quality(
            split="test",
            num_examples=100,
            loss=3 + index % 7 / 10,
            metrics=build_scores(rougeL=Interval(mean=score, low=score - 2, high=score + 2)),
            headline_metric="rougeL",
            samples=(Sample(id="a", prompt="a prompt", reference="a reference", generated=f"by {index}"),),
        )
        values: dict[str, Any] = {
            "quality": quality,
            "step_losses": tuple(3 + 1 / (step + 1) for step in range(500)),
            "steps": 500,
            "step_seconds": (0.1,) * 500,
            "step_tokens": (100,) * 500,
            "flops": Flops(model_flops=(index + 1) * 10**9),
            "memory": {"train": Memory(allocated_bytes=(index % 50 + 1) * 2**20)},
            "state_bytes": StateBytes(weights=2**18, gradients=2**17, optimizer=2**17),
            "outcome": Outcome(kind="ok"),
            "seed": index,
        }
        records[Path(f"runs/{kind}-{index}/record.json")] = build_record(
            f"{kind}-{index}", kind, 10 + index % 4, **values
        )
    return records


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_page_of_many_runs_sorts_and_filters(count: int, open_page: OpenPage, tmp_path: Path) -> None:
    """Check that the page shows curves and summaries of a few runs only, and states their number."""
    page = open_page(write_page(_build_records(count), tmp_path))
    assert page.console == []
    assert page.tab.locator("#runs tbody tr").count() == count
    page.tab.locator(f"{header_selector('model compute (TFLOP)')} button").click()
    page.tab.locator(f"{header_selector('model compute (TFLOP)')} button").click()
    assert page.tab.locator("#runs tbody tr").first.locator("th").inner_text() == f"prompt_tuning-{count - 1}"
    page.tab.fill("#filter", "lora-2")
    assert page.tab.locator("#count").inner_text().endswith(f"of {count}")
    assert f"24 of {count:,} runs are shown" in page.tab.locator("#losses").inner_text()
    assert page.tab.locator(".example tbody tr").count() == 25


def test_shipped_suites_exist() -> None:
    """Check that the test of every shipped suite has suites."""
    assert len(SHIPPED) >= 4


@pytest.mark.parametrize("name", mark_others_slow({name: name for name in SHIPPED}, "demo_seeds"))
def test_every_shipped_suite_opens_without_console_messages(name: str, open_page: OpenPage, tmp_path: Path) -> None:
    """Check pages of records of any version and of suites without a trade-off."""
    page = open_page(write_page(load_shipped_records(name), tmp_path))
    assert page.console == []
    assert page.tab.locator("#runs tbody tr").count() == len(read_records(SHIPPED[name]))


@pytest.mark.parametrize(
    ("width", "height"),
    [(1280, 900), pytest.param(820, 1180, marks=pytest.mark.slow), (375, 700)],
)
def test_labels_in_charts_do_not_overlap(width: int, height: int, open_page: OpenPage, tmp_path: Path) -> None:
    """Check the drawn texts of the demo's trade-off charts."""
    page = open_page(write_page(load_shipped_records("demo"), tmp_path), width=width, height=height)
    boxes: list[list[dict[str, float]]] = page.evaluate(
        "[...document.querySelectorAll('[data-chart^=quality]')].map(c => "
        "[...c.querySelectorAll('.mark-text text')].filter(t => t.textContent).map(t => {"
        "const b = t.getBoundingClientRect(); return {l: b.left, r: b.right, t: b.top, b: b.bottom}; }))"
    )
    assert [len(labels) >= 4 for labels in boxes] == [True] * 3
    for labels in boxes:
        for index, one in enumerate(labels):
            for other in labels[index + 1 :]:
                is_apart = one["r"] - 1 <= other["l"] or other["r"] - 1 <= one["l"]
                # A box is as high as a line; its glyphs are lower.
                assert is_apart or one["b"] - 4 <= other["t"] or other["b"] - 4 <= one["t"], (one, other)


def test_cut_table_has_a_sign_until_its_end_is_visible(open_page: OpenPage, tmp_path: Path) -> None:
    """Check the shadow and the hint at 1,280 pixels, and that both are absent where all columns fit."""
    path = write_page(load_shipped_records("demo"), tmp_path)
    page = open_page(path, width=1280)
    box = "document.querySelector('#table .scroll')"
    hint = "getComputedStyle(document.querySelector('.cut-hint')).display"
    assert page.evaluate(f"{box}.scrollWidth > {box}.clientWidth")
    assert page.evaluate(f"{box}.hasAttribute('data-cut')")
    assert page.evaluate(hint) == "block"
    page.evaluate(f"{box}.scrollLeft = {box}.scrollWidth")
    page.tab.wait_for_selector("#table .scroll:not([data-cut])")
    baselines = {path: record for path, record in load_shipped_records("demo").items() if record.tokens is None}
    (tmp_path / "baselines").mkdir()
    wide = open_page(write_page(baselines, tmp_path / "baselines"), width=1280)
    assert not wide.evaluate(f"{box}.hasAttribute('data-cut')")
    assert wide.evaluate(hint) == "none"


def test_run_names_break_only_after_punctuation(open_page: OpenPage, tmp_path: Path) -> None:
    """Check that each part of a long name is on one line."""
    name = "full-checkpointing-path=openai-community_gpt2-medium.learning_rate"
    page = open_page(write_page({tmp_path / "record.json": build_record(name, "full", 1)}, tmp_path), width=375)
    parts: list[int] = page.evaluate(
        "(() => { const cell = document.querySelector('#runs tbody th'); return [...cell.childNodes]"
        ".filter(n => n.nodeType === 3 && n.textContent.trim()).map(n => { const r = document.createRange();"
        " r.selectNodeContents(n); return r.getClientRects().length; }); })()"
    )
    assert len(parts) >= 6
    assert set(parts) == {1}, parts
