"""Render pages as self-contained HTML: escaped text, scripts allowed by their digests, no network access."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from peftbench.report.diff.compute import SuiteDiff
from peftbench.report.diff.render import config_cells, footer_lines, header_lines, metric_cells, regression_summary
from peftbench.report.page.charts import chart_specs
from peftbench.report.page.content import PageData

_DIFF_COLUMNS = ("metric", "before", "after", "change", "verdict")
_SECTIONS = {
    "summary": "Summary",
    "trade-offs": "Quality vs. cost",
    "table": "Comparison",
    "memory": "Memory and throughput",
    "losses": "Training loss",
    "samples": "Examples",
    "protocol": "Protocol",
    "reproduce": "Reproduce",
}


def render_page(page_data: PageData, downloads: Mapping[str, Mapping[str, str]]) -> str:
    """Return the page as HTML. ``downloads`` are files by kind, each with name, media type and text."""
    library, script = _bundle_vega(), _read_page_file("page.js")
    visible = _visible_sections(page_data)
    return _load_template("page.html.jinja").render(
        page=page_data,
        specs=chart_specs(page_data.all_charts),
        downloads=downloads,
        sections=[(name, title) for name, title in _SECTIONS.items() if name in visible],
        # Only these two may run. A script in generated text would not, even if it were not escaped.
        allowed_scripts=Markup(" ".join(map(_csp_hash, (library, script)))),  # noqa: S704 — digests only
        library=Markup(library),  # noqa: S704
        script=Markup(script),  # noqa: S704
        style=Markup(_read_page_file("page.css")),  # noqa: S704 — own file
    )


def render_diff_page(diff: SuiteDiff) -> str:
    """Return the comparison of two result folders as HTML without scripts."""
    rows = [
        {"run": run.label, "verdict_class": verdict} | dict(zip(_DIFF_COLUMNS, cells, strict=True))
        for run in diff.runs
        for cells, verdict in metric_cells(run)
    ]
    sentences = [*([regression_summary(diff)] if diff.regressed else []), *header_lines(diff)[2:], *footer_lines(diff)]
    return _load_template("diff.html.jinja").render(
        diff=diff,
        rows=rows,
        config=list(config_cells(diff)),
        sentences=sentences,
        style=Markup(_read_page_file("page.css")),  # noqa: S704 — own file
    )


def _load_template(name: str) -> Template:
    loader = PackageLoader("peftbench.report.page", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters["breakable"] = make_breakable
    return environment.get_template(name)


def make_breakable(name: str) -> Markup:
    """Return a run's name as HTML that a line may break after punctuation, and nowhere else."""
    return Markup("<wbr>").join(re.findall(r"[^-_=.,/+]*[-_=.,/+]?", name)[:-1])


def _visible_sections(page_data: PageData) -> set[str]:
    """Return the sections with content."""
    optional = {
        "trade-offs": page_data.trade_off_charts,
        "memory": page_data.memory_chart or page_data.throughput_chart,
        "losses": page_data.loss_charts,
        "samples": page_data.examples,
    }
    return {name for name in _SECTIONS if name not in optional or optional[name]}


def _read_page_file(name: str) -> str:
    return (files("peftbench.report.page") / name).read_text(encoding="utf-8")


@cache
def _bundle_vega() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script, from vl-convert."""
    import vl_convert
    from altair import SCHEMA_VERSION

    version = re.sub(r"^v?(\d+\.\d+).*", r"\1", SCHEMA_VERSION)
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _csp_hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
