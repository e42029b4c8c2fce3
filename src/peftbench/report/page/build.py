"""The page as one file: text escaped, scripts known by their digests, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from peftbench.report.beside import Beside
from peftbench.report.beside_text import config_cells, end, figure_cells, regressed, where
from peftbench.report.page.charts import as_data
from peftbench.report.page.content import Content

_BESIDE = ("figure", "before", "after", "change", "verdict")
_SECTIONS = {
    "summary": "In words", "trade-offs": "What quality costs", "table": "The comparison", "memory": "Memory and speed",
    "losses": "How the loss fell", "samples": "Examples", "protocol": "The protocol", "repeat": "How to repeat it",
}  # fmt: skip


def page(content: Content, downloads: Mapping[str, Mapping[str, str]]) -> str:
    """The page's HTML; ``downloads`` are files by their kind, each with name, type and text."""
    library, script = _library(), _own("page.js")
    there = _there(content)
    return _template("page.html.jinja").render(
        page=content, specs=as_data(content.drawings), downloads=downloads,
        sections=[(name, title) for name, title in _SECTIONS.items() if name in there],
        # Only these two may run: a script that a model wrote would not, even if it were not escaped.
        allowed_scripts=Markup(" ".join(map(_digest, (library, script)))),  # noqa: S704 — made of digests alone
        library=Markup(library), script=Markup(script), style=Markup(_own("page.css")),  # noqa: S704 — files of ours
    )  # fmt: skip


def beside_page(found: Beside) -> str:
    """The HTML of two suites side by side; it needs no script."""
    rows = [
        {"run": pair.label, "verdict_class": verdict} | dict(zip(_BESIDE, cells, strict=True))
        for pair in found.pairs for cells, verdict in figure_cells(pair)
    ]  # fmt: skip
    sentences = [*([regressed(found)] if found.fell else []), *where(found)[2:], *end(found)]
    return _template("beside.html.jinja").render(
        found=found, rows=rows, config=list(config_cells(found)), sentences=sentences,
        style=Markup(_own("page.css")),  # noqa: S704 — a file of ours
    )  # fmt: skip


def _template(name: str) -> Template:
    loader = PackageLoader("peftbench.report.page", ".")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template(name)


def _there(content: Content) -> set[str]:
    """Sections that have something to show."""
    optional = {
        "trade-offs": content.trade_offs, "memory": content.memory or content.speed, "losses": content.losses,
        "samples": content.examples,
    }  # fmt: skip
    return {name for name in _SECTIONS if name not in optional or optional[name]}


def _own(name: str) -> str:
    return (files("peftbench.report.page") / name).read_text(encoding="utf-8")


@cache
def _library() -> str:
    """Vega, Vega-Lite and vega-embed in one script, as vl-convert carries them."""
    import vl_convert
    from altair import SCHEMA_VERSION

    version = re.sub(r"^v?(\d+\.\d+).*", r"\1", SCHEMA_VERSION)
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
