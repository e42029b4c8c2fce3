"""The page as a person meets it: in a real browser, from a file, without a network."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

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
)
from tests.unit.report.page.conftest import Open
from tests.unit.report.page.pages import SHIPPED, page_of, shipped
from tests.unit.report.records import record

SIZES = [(1440, 900), (820, 1180), (375, 700)]
"""A screen, a tablet, a phone."""


def by_title(title: str) -> str:
    """The head of a column."""
    return f"#runs thead th[data-column='{title}']"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES, ids=["screen", "tablet", "phone"])
def test_opens_without_a_word(size: tuple[int, int], scheme: str, opened: Open, tmp_path: Path) -> None:
    """Nothing is said on the console, nothing is asked of a network, every chart is drawn, nothing sticks out."""
    path = page_of(shipped("demo"), tmp_path)
    page = opened(path, width=size[0], height=size[1], color_scheme=scheme)
    assert page.said == []
    assert page.asked == [path.resolve().as_uri()]
    drawn = page.see("[...document.querySelectorAll('[data-chart]')].map(b => [b.dataset.drawn, b.innerText])")
    assert len(drawn) >= 6
    assert all(state == "yes" for state, _ in drawn)
    marks = page.see("[...document.querySelectorAll('[data-chart] svg')].map(s => s.querySelectorAll('path').length)")
    assert len(marks) == len(drawn)
    assert min(marks) >= 5
    names = page.see("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(names) == len(set(names))
    assert page.see("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    sticking_out = page.see(
        "[...document.querySelectorAll('.chart')].filter(b => b.querySelector('svg').getBoundingClientRect().width "
        "> b.getBoundingClientRect().width + 1).length"
    )
    assert sticking_out == 0


def test_colours_follow_the_theme(opened: Open, tmp_path: Path) -> None:
    """The charts' ink is the page's own, in light and in dark and, when it goes to paper, black on white."""
    path = page_of(shipped("demo"), tmp_path)
    ink = "getComputedStyle(document.querySelector('.chart svg text')).fill"
    found = {scheme: opened(path, color_scheme=scheme).see(ink) for scheme in ("light", "dark")}
    assert found == {"light": "rgb(27, 27, 31)", "dark": "rgb(233, 233, 238)"}
    on_paper = opened(path, color_scheme="dark")
    on_paper.page.emulate_media(media="print")
    assert on_paper.see(ink) == "rgb(0, 0, 0)"
    assert on_paper.page.pdf().startswith(b"%PDF")


def test_sorts_by_what_is_meant(opened: Open, tmp_path: Path) -> None:
    """By numbers and not by their digits, both ways, by mouse and by key; what is not known stays last."""
    page = opened(page_of(shipped("demo"), tmp_path))

    def order() -> list[str]:
        found: list[str] = page.see("[...document.querySelectorAll('#runs tbody th')].map(h => h.textContent)")
        return found

    button = page.page.locator(f"{by_title('peak mem (MiB)')} button")
    button.click()
    assert order() == ["last_layer", "prompt_tuning", "lora", "full", "lead_1", "zero_shot"]
    assert page.page.locator(by_title("peak mem (MiB)")).get_attribute("aria-sort") == "ascending"
    button.press("Enter")
    assert order() == ["full", "lora", "prompt_tuning", "last_layer", "lead_1", "zero_shot"]
    assert page.page.locator(by_title("peak mem (MiB)")).get_attribute("aria-sort") == "descending"
    page.page.locator(f"{by_title('run')} button").press("Space")
    assert order() == sorted(order())
    assert page.page.locator("#runs th[aria-sort=none]").count() == page.page.locator("#runs thead th").count() - 1


def test_a_column_says_what_it_means(opened: Open, tmp_path: Path) -> None:
    """Pointed at or focused, a title shows its definition inside the window; Escape takes it away."""
    page = opened(page_of(shipped("demo"), tmp_path), width=375, height=700)
    meaning = page.page.locator(f"{by_title('held-out loss')} [role=tooltip]")
    assert not meaning.is_visible()
    page.page.locator(f"{by_title('held-out loss')} button").hover()
    assert "cross-entropy" in meaning.inner_text()
    page.page.wait_for_timeout(100)
    box = meaning.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 375
    page.page.mouse.move(0, 0)
    meaning.wait_for(state="hidden")
    page.page.locator(f"{by_title('run')} button").focus()
    page.page.keyboard.press("Tab")
    page.page.keyboard.press("Tab")
    page.page.keyboard.press("Tab")
    assert meaning.is_visible()
    page.page.keyboard.press("Escape")
    assert not meaning.is_visible()
    described = page.page.locator(f"{by_title('held-out loss')} button").get_attribute("aria-describedby")
    assert meaning.get_attribute("id") == described


def test_a_point_says_whose_it_is(opened: Open, tmp_path: Path) -> None:
    """Pointed at, a mark of a chart shows its run and its figures; a screen reader has them in its label."""
    page = opened(page_of(shipped("demo"), tmp_path))
    point = page.page.locator("#chart-quality-mib svg .mark-symbol.role-mark path[aria-label*='full']").first
    label = point.get_attribute("aria-label")
    assert label is not None
    assert "run: full" in label
    point.scroll_into_view_if_needed()
    point.hover(force=True)
    page.page.wait_for_selector("#vg-tooltip-element.visible")
    assert "full" in page.page.locator("#vg-tooltip-element").inner_text()


def test_what_is_no_number_is_sorted_last(opened: Open, tmp_path: Path) -> None:
    """A diverged run's loss is no figure: it stays last both ways, and the chart and the table are whole."""
    bad = record(
        "bad", "lora", 10, loss=float("nan"), outcome=Outcome(kind="diverged", step=2), step_losses=(1.0, float("inf"))
    )
    rows = [bad, record("a", "full", 1000, loss=2.0), record("b", "full", 1000, loss=3.0)]
    page = opened(page_of({tmp_path / one.name / "record.json": one for one in rows}, tmp_path))
    assert page.said == []
    for best in ("a (full)", "b (full)"):
        page.page.locator(f"{by_title('held-out loss')} button").click()
        order = page.see("[...document.querySelectorAll('#runs tbody th')].map(h => h.textContent)")
        assert (order[0], order[-1]) == (best, "bad (lora)")


def test_small_numbers_are_numbers(opened: Open, tmp_path: Path) -> None:
    """Five of ten million is less than one of a thousand, though its first digit is larger and it has an exponent."""
    sizes = {"few": (5, 10_000_000), "some": (1, 1000), "half": (1, 2)}
    rows = [
        record(name, "lora", 10, parameters=ParameterCounts(trainable=part, total=whole))
        for name, (part, whole) in sizes.items()
    ]
    page = opened(page_of({tmp_path / one.name / "record.json": one for one in rows}, tmp_path))
    page.page.locator(f"{by_title('trainable %')} button").click()
    order = page.see("[...document.querySelectorAll('#runs tbody th')].map(h => h.textContent)")
    assert order == ["few (lora)", "some (lora)", "half (lora)"]


def test_a_phone_shows_long_names(opened: Open, tmp_path: Path) -> None:
    """With everything opened, names as long as a sweep's make nothing stick out of a phone."""
    page = opened(page_of(shipped("demo_rates"), tmp_path), width=375, height=700)
    page.see("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.see("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_finds_a_run(opened: Open, tmp_path: Path) -> None:
    """Words in the field leave the rows that have them all, and say how many those are."""
    page = opened(page_of(shipped("demo_budget"), tmp_path))
    page.page.fill("#filter", "FULL oom")
    assert page.page.locator("#runs tbody tr:visible").count() == 1
    assert page.page.locator("#count").inner_text() == "1 of 3"
    page.page.fill("#filter", "")
    assert page.page.locator("#runs tbody tr:visible").count() == 3


@pytest.mark.parametrize("kind", ["csv", "json", "tex"])
def test_the_data_can_be_had(kind: str, opened: Open, tmp_path: Path) -> None:
    """A button saves the file that the report writes, whole."""
    page = opened(page_of(shipped("demo"), tmp_path))
    with page.page.expect_download() as waiting:
        page.page.click(f"[data-download={kind}]")
    text = Path(waiting.value.path()).read_text(encoding="utf-8")
    assert waiting.value.suggested_filename == f"results.{kind}"
    if kind == "csv":
        assert {row["run"] for row in csv.DictReader(io.StringIO(text))} == {r.name for r in shipped("demo").values()}
    elif kind == "json":
        assert len(json.loads(text)["runs"]) == len(shipped("demo"))
    else:
        assert "\\toprule" in text
    assert page.said == []


HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\"'&{{ 7 * 7 }}"


def test_what_a_model_wrote_stays_text(opened: Open, tmp_path: Path) -> None:
    """Markup in summaries, articles, names, notes and devices is shown as it is, and none of it runs."""
    bad = record(HOSTILE, "lora", 10, notes=(HOSTILE,), git_commit=HOSTILE, library_versions={HOSTILE: HOSTILE})
    assert bad.quality is not None
    sample = Sample(id=HOSTILE, article=HOSTILE, reference=HOSTILE, generated=HOSTILE)
    bad = bad.model_copy(
        update={
            "quality": bad.quality.model_copy(update={"samples": (sample,)}),
            "step_losses": (3.0, 2.0),
            "step_seconds": (1.0, 1.0),
            "device": bad.device.model_copy(update={"name": HOSTILE}),
            "memory": {"train": Memory(allocated_bytes=2**20)},
        }
    )
    page = opened(page_of({tmp_path / "bad" / "record.json": bad}, tmp_path, title=HOSTILE, summary=[HOSTILE]))
    page.page.wait_for_timeout(300)
    assert page.said == []
    assert len(page.asked) == 1
    assert page.see("window.hacked") is None
    assert page.see("document.querySelectorAll('img').length") == 0
    assert page.see("document.querySelectorAll('script').length") == 4
    assert page.page.locator("blockquote").inner_text() == HOSTILE
    assert page.page.locator("td.text").nth(1).inner_text() == HOSTILE
    assert page.page.title() == f"{HOSTILE} – peftbench"
    mark = page.page.locator("#chart-quality-mib svg .mark-symbol.role-mark path").first
    mark.hover(force=True)
    page.page.wait_for_selector("#vg-tooltip-element.visible")
    assert page.see("document.querySelectorAll('#vg-tooltip-element img, #vg-tooltip-element script').length") == 0
    assert page.see("window.hacked") is None


def test_a_script_that_is_not_ours_would_not_run(opened: Open, tmp_path: Path) -> None:
    """Even unescaped it would not: the page's policy knows its own scripts by their digests, and no eval."""
    path = page_of(shipped("demo"), tmp_path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("</main>", "<script>window.hacked = 1</script></main>"), encoding="utf-8")
    page = opened(path)
    assert page.see("window.hacked") is None
    assert any("Content Security Policy" in line for line in page.said)


def test_nothing_is_lost_without_scripts(opened: Open, tmp_path: Path) -> None:
    """Where no script runs, the table and all text are there, and what is missing is said."""
    page = opened(page_of(shipped("demo"), tmp_path), java_script_enabled=False)
    assert page.page.locator("#runs tbody tr").count() == 6
    assert page.page.locator("noscript").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_is_accessible(scheme: str, opened: Open, tmp_path: Path) -> None:
    """axe, the usual checker of the WCAG's rules, finds no violation: contrast, labels, order of heads, roles."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = opened(page_of(shipped("demo"), tmp_path), color_scheme=scheme, bypass_csp=True)
    found = axe.Axe().run(page.page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]}).response
    assert [(v["id"], [node["html"][:200] for node in v["nodes"]][:3]) for v in found["violations"]] == []
    assert len(found["passes"]) > 20


def test_what_did_not_fit_is_there(opened: Open, tmp_path: Path) -> None:
    """A run that was out of memory has its row, its bar with what it asked for, and a line for the budget."""
    page = opened(page_of(shipped("demo_budget"), tmp_path))
    row = page.page.locator(
        "#runs tbody tr",
        has=page.page.locator("th", has_text="full (oom)").or_(page.page.locator("th:text-is('full')")),
    )
    assert "oom at step 2" in row.first.inner_text()
    bars = page.see(
        "[...document.querySelectorAll('#chart-memory [aria-label]')].map(e => e.getAttribute('aria-label'))"
    )
    assert any("requested allocation" in str(bar) for bar in bars)
    assert sum("limit: budget" in str(bar) and "112" in str(bar) for bar in bars) == 1
    assert "full (oom at step 2)" in page.page.locator("#trade-offs").inner_text()


def _many(count: int) -> dict[Path, RunRecord]:
    """Runs of four methods, of many rates and seeds, each with curves."""
    kinds = ("full", "last_layer", "lora", "prompt_tuning")
    made = {}
    for index in range(count):
        kind, score = kinds[index % 4], 20 + (index * 37 % 100) / 10
        quality = Quality(
            split="test",
            num_examples=100,
            loss=3 + index % 7 / 10,
            rouge={"rougeL": Interval(mean=score, low=score - 2, high=score + 2)},
            samples=(Sample(id="a", article="an article", reference="a reference", generated=f"by {index}"),),
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
        made[Path(f"runs/{kind}-{index}/record.json")] = record(f"{kind}-{index}", kind, 10 + index % 4, **values)
    return made


def test_a_thousand_runs(opened: Open, tmp_path: Path) -> None:
    """The page of 1,000 runs opens, sorts and finds; curves and summaries are of a few, which it says."""
    page = opened(page_of(_many(1000), tmp_path))
    assert page.said == []
    assert page.page.locator("#runs tbody tr").count() == 1000
    page.page.locator(f"{by_title('model TFLOPs')} button").click()
    page.page.locator(f"{by_title('model TFLOPs')} button").click()
    assert page.page.locator("#runs tbody tr").first.locator("th").inner_text() == "prompt_tuning-999"
    page.page.fill("#filter", "lora-2")
    assert page.page.locator("#count").inner_text().endswith("of 1000")
    assert "24 of 1,000 runs are shown" in page.page.locator("#losses").inner_text()
    assert page.page.locator(".example tbody tr").count() == 25


def test_there_are_pages() -> None:
    """Every folder of shipped records makes a page, and there are some."""
    assert len(SHIPPED) >= 4


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_suite_has_a_page(name: str, opened: Open, tmp_path: Path) -> None:
    """Of records of any age, and of suites without a trade-off, a page is made that opens without a word."""
    page = opened(page_of(shipped(name), tmp_path))
    assert page.said == []
    assert page.page.locator("#runs tbody tr").count() == len(read_records(SHIPPED[name]))
