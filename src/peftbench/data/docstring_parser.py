"""Harvest docstrings from Python source trees, by reading them: nothing is imported or executed.

The unit is one docstring, exactly as :func:`inspect.cleandoc` (PEP 257 indentation rules) prints it, with the
distribution it came from. Two views are taken from it: the whole text, on which the shipped base is pretrained, and the
pair *(rest of the docstring, summary line)*, on which every method is fine-tuned.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

STANDARD_LIBRARY = "python"
SUMMARY_CHARS = (20, 200)
MIN_BODY_CHARS = 150
MIN_SUMMARY_WORDS = 4

# Tests and vendored copies repeat other packages' text; the standard library's site-packages belongs to others.
_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "idle_test", "_vendor", "site-packages", "__pycache__"})
_DOCSTRING_NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class Docstring:
    """One docstring: where it was found (``package``, ``where`` as ``path:qualified name``) and its clean text."""

    package: str
    location: str
    text: str


@dataclass(frozen=True, slots=True)
class SummarizationPair:
    """One summarisation example: ``article`` is the docstring without its summary line, ``summary`` that line."""

    package: str
    location: str
    article: str
    summary: str


def resolve_dependencies(distribution: str) -> list[str]:
    """Names of the installed distributions that ``distribution`` needs at run time, itself and extras excluded.

    Walks ``Requires-Dist`` as far as its environment markers hold here (PEP 508), so that development tools which
    happen to be installed beside the project do not change the corpus.
    """
    found: dict[str, None] = {}
    queue = [distribution]
    while queue:
        try:
            required = metadata.distribution(queue.pop()).requires or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, required):
            name = canonicalize_name(requirement.name)
            if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            found[name] = None
            queue.append(name)
    return sorted(found)


def canonicalize_name(name: str) -> str:
    """A distribution's name in its normal form (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def list_source_files(distributions: Iterable[str]) -> list[tuple[str, Path, str]]:
    """Python files of the standard library and of ``distributions``: ``(package, root folder, path below it)``."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = [(STANDARD_LIBRARY, stdlib, str(path.relative_to(stdlib))) for path in stdlib.rglob("*.py")]
    for name in distributions:
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        root = Path(str(found.locate_file("")))
        files += [(name, root, str(path)) for path in found.files or () if path.suffix == ".py"]
    return sorted(
        f for f in files if not _SKIPPED_FOLDERS.intersection(Path(f[2]).parts[:-1]) and not _is_test_file(f[2])
    )


def _is_test_file(path: str) -> bool:
    name = Path(path).name
    return name.startswith("test_") or name.endswith("_test.py") or ".." in path


def parse_docstrings(source_file: tuple[str, Path, str]) -> list[Docstring]:
    """Every docstring of one Python file, in order of appearance; a file that does not parse has none."""
    package, root, path = source_file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            tree = ast.parse((root / path).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    return [Docstring(package, f"{path}:{name}", text) for name, text in _walk_docstrings(tree, "")]


def _walk_docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, _DOCSTRING_NODES):
        text = ast.get_docstring(node, clean=False)
        if text and text.strip():
            yield name or "<module>", inspect.cleandoc(text).strip()
    for child in ast.iter_child_nodes(node):
        below = getattr(child, "name", None) if isinstance(child, _DOCSTRING_NODES) else None
        yield from _walk_docstrings(child, f"{name}.{below}".strip(".") if below else name)


def extract_docstrings(distribution: str, workers: int = 2) -> Iterator[list[Docstring]]:
    """Docstrings of the standard library and the run-time dependencies of ``distribution``, file by file, in order.

    Yields one list a file, so that a caller can show progress against ``len(sources(closure(distribution)))``.
    """
    files = list_source_files(resolve_dependencies(distribution))
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(parse_docstrings, files, chunksize=64)


def build_pair(docstring: Docstring) -> SummarizationPair | None:
    """The docstring as a summarisation pair, or None where PEP 257 gives no summary line worth predicting.

    A summary is the first line, followed by a blank one, of 20 to 200 characters and at least four words, ending in a
    full stop; the rest must have at least 150 characters.
    """
    summary, _, rest = docstring.text.partition("\n")
    summary, article = summary.strip(), rest.strip()
    shortest, longest = SUMMARY_CHARS
    if rest.split("\n", 1)[0].strip() or not shortest <= len(summary) <= longest or len(article) < MIN_BODY_CHARS:
        return None
    if len(summary.split()) < MIN_SUMMARY_WORDS or not summary.endswith(".") or not summary[0].isalpha():
        return None
    return SummarizationPair(docstring.package, docstring.location, article, summary)


def normalize_text(text: str) -> str:
    """What two copies of a text share: its lower-case letters and digits. The key for finding duplicates."""
    return re.sub(r"[^a-z0-9]+", "", text.lower())
