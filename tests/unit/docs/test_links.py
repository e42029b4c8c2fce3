"""Links, anchors and paths in the documentation."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.unit.docs.prose import ROOT

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"[\w.-]+(?:/[\w.\-{},*]+)+/?")
# A path in backticks is checked if its first folder is one of these or a folder of the package.
_ROOTS = ("src", "tests", "docs", "recipes", "launch", "benchmarks", "accel_configs", "ds_configs", ".ci", ".github")


def _list_documents() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return sorted(ROOT / name for name in set(listing.stdout.splitlines()) if (ROOT / name).is_file())


def _find_anchors(document: Path) -> set[str]:
    """Return the anchors GitHub makes for a document's headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _find_broken_links(document: Path) -> list[str]:
    broken = []
    for link in _LINK.findall(document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if not target.exists() or (anchor and anchor not in _find_anchors(target)):
            broken.append(link)
    return broken


def _expand_braces(path: str) -> list[str]:
    match = re.search(r"\{([^}]*)\}", path)
    if not match:
        return [path]
    return [
        expanded
        for part in match[1].split(",")
        for expanded in _expand_braces(path[: match.start()] + part + path[match.end() :])
    ]


def _path_exists(path: str, document: Path) -> bool:
    bases = (ROOT, ROOT / "src" / "peftbench", document.parent)
    return any(any(base.glob(path)) if "*" in path else (base / path).exists() for base in bases)


def _find_missing_paths(document: Path) -> list[str]:
    packages = {folder.name for folder in (ROOT / "src" / "peftbench").iterdir() if folder.is_dir()}
    missing = []
    for span in _SPAN.findall(document.read_text(encoding="utf-8")):
        if not _PATH.fullmatch(span) or span.split("/")[0] not in {*_ROOTS, *packages} or "NAME" in span:
            continue
        missing += [path for path in _expand_braces(span) if not _path_exists(path.rstrip("/"), document)]
    return missing


@pytest.mark.parametrize("document", _list_documents(), ids=lambda document: str(document.relative_to(ROOT)))
def test_links_and_paths_exist(document: Path) -> None:
    """Check every relative link, anchor and source path in a document."""
    assert not _find_broken_links(document)
    assert not _find_missing_paths(document)


def test_broken_link_and_missing_path_are_reported(tmp_path: Path) -> None:
    """Check that a missing file, a missing anchor and a missing path in backticks are reported."""
    document = tmp_path / "page.md"
    document.write_text(
        "# One title\n[a](missing.md) [b](#one-title) [c](#two)\n`src/peftbench/missing.py` `src/peftbench`\n"
    )
    assert _find_broken_links(document) == ["missing.md", "#two"]
    assert _find_missing_paths(document) == ["src/peftbench/missing.py"]
