"""Extract docstrings from Python source files. Files are parsed; nothing is imported or executed.

Each docstring is cleaned by :func:`inspect.cleandoc` (PEP 257 indentation rules) and stored with its distribution. The
full text is used to pretrain the shipped base model. The pair *(rest of the docstring, summary line)* is used for
fine-tuning.
"""

from __future__ import annotations

import ast
import gc
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

STANDARD_LIBRARY = "python"
SUMMARY_CHARS = (20, 200)
MIN_BODY_CHARS = 150
MIN_SUMMARY_WORDS = 4

# Tests and vendored copies repeat other packages' text; site-packages is not part of the standard library.
_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "idle_test", "_vendor", "site-packages", "__pycache__"})
_DOCSTRING_NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_STATEMENT_NODES = (ast.stmt, ast.excepthandler, ast.match_case)  # what can contain a definition


@dataclass(frozen=True, slots=True)
class Docstring:
    """One docstring: its ``package``, its ``location`` (``path:qualified name``) and its cleaned ``text``."""

    package: str
    location: str
    text: str


@dataclass(frozen=True, slots=True)
class SummarizationPair:
    """One summarization example: ``article`` is the docstring without its summary line, ``summary`` is that line."""

    package: str
    location: str
    article: str
    summary: str


def list_source_files(distributions: Iterable[str]) -> list[tuple[str, Path, str]]:
    """List Python files of the standard library and of ``distributions``: ``(package, root folder, relative path)``.

    A distribution that is not installed adds no files.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = [(STANDARD_LIBRARY, stdlib, str(path.relative_to(stdlib))) for path in stdlib.rglob("*.py")]
    for name in distributions:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        root = Path(str(distribution.locate_file("")))
        files += [(name, root, str(path)) for path in distribution.files or () if path.suffix == ".py"]
    return sorted(file for file in files if not _is_skipped(file[2]))


def _is_skipped(path: str) -> bool:
    name = Path(path).name
    is_test = name.startswith("test_") or name.endswith("_test.py")
    return is_test or ".." in path or bool(_SKIPPED_FOLDERS.intersection(Path(path).parts[:-1]))


def parse_docstrings(source_file: tuple[str, Path, str]) -> list[Docstring]:
    """Return every docstring of one Python file, in order of appearance; none if the file cannot be parsed."""
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
        if not isinstance(child, _STATEMENT_NODES):
            continue
        below = getattr(child, "name", None) if isinstance(child, _DOCSTRING_NODES) else None
        yield from _walk_docstrings(child, f"{name}.{below}".strip(".") if below else name)


def extract_docstrings(files: Sequence[tuple[str, Path, str]], workers: int = 2) -> Iterator[list[Docstring]]:
    """Yield the docstrings of each of ``files`` (see :func:`list_source_files`) in order, one list per file."""
    # Syntax trees have no reference cycles, and looking for cycles takes most of the time of parsing.
    with ProcessPoolExecutor(workers, initializer=gc.disable) as pool:
        yield from pool.map(parse_docstrings, files, chunksize=64)


def build_pair(docstring: Docstring) -> SummarizationPair | None:
    """Return the docstring as a summarization pair, or None if it has no usable PEP 257 summary line.

    The summary is the first line: 20 to 200 characters, at least four words, ends in a full stop, followed by a blank
    line. The rest must have at least 150 characters.
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
    """Return the lower-case letters and digits of ``text``, the key for finding duplicates."""
    return re.sub(r"[^a-z0-9]+", "", text.lower())
