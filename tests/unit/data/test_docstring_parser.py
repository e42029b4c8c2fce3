"""Docstrings are parsed from source text, never imported, and pairs follow the documented rules."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from peftbench.data.docstring_parser import (
    MIN_BODY_CHARS,
    STANDARD_LIBRARY,
    SUMMARY_CHARS,
    Docstring,
    build_pair,
    extract_docstrings,
    list_source_files,
    normalize_text,
    parse_docstrings,
)

BODY = "This paragraph adds more details, at some length. " * 4


def read_text(folder: Path, text: str | bytes) -> list[Docstring]:
    """Parse a file with this content."""
    path = folder / "module.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse_docstrings(("package", folder, "module.py"))


def install(site: Path, name: str, files: Sequence[str] = (), requires: Sequence[str] = ()) -> None:
    """Write a distribution as an installer does, with ``files`` that have one docstring each."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    needed = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needed}", encoding="utf-8")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files), encoding="utf-8")
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(f'"""{file}"""\n', encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder where distributions can be installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


# --- reading ---------------------------------------------------------------------------------------------------------


def test_reads_every_docstring_with_its_qualified_name(tmp_path: Path) -> None:
    """Modules, classes, functions and coroutines are read in order, nested ones too; other strings are ignored."""
    text = '''"""The module."""
x = """a string that is not a docstring"""
class A:
    """The class."""
    async def wait(self):
        """The coroutine."""
    class B:
        """The inner class."""
def f():
    """The function."""
    def g():
        """The inner function."""
def bare():
    pass
if True:
    def conditional():
        """The conditional one."""
'''
    docstrings = [(docstring.location, docstring.text) for docstring in read_text(tmp_path, text)]
    assert docstrings == [
        ("module.py:<module>", "The module."),
        ("module.py:A", "The class."),
        ("module.py:A.wait", "The coroutine."),
        ("module.py:A.B", "The inner class."),
        ("module.py:f", "The function."),
        ("module.py:f.g", "The inner function."),
        ("module.py:conditional", "The conditional one."),
    ]


def test_nothing_is_imported(tmp_path: Path) -> None:
    """A module that raises and writes a file on import is read without either."""
    text = f'''"""Dangerous."""
open({str(tmp_path / "executed")!r}, "w").close()
raise SystemExit("imported")
def after():
    """Never reached, but read."""
'''
    modules = set(sys.modules)
    assert [docstring.text for docstring in read_text(tmp_path, text)] == ["Dangerous.", "Never reached, but read."]
    assert not (tmp_path / "executed").exists()
    assert "module" not in set(sys.modules) - modules


def test_indentation_is_removed(tmp_path: Path) -> None:
    """The common margin and blank lines at both ends are removed, as by inspect.cleandoc."""
    text = 'def f():\n    """Summary.\n\n    First.\n        Indented.\n    """\n'
    assert [docstring.text for docstring in read_text(tmp_path, text)] == ["Summary.\n\nFirst.\n    Indented."]


@pytest.mark.parametrize(
    "content",
    [
        "def broken(:\n",
        "print 'python 2'\n",
        b"\x00\x01",
        b'"""\xff\xfe latin without saying so"""',
        "",
        '"""   \n """\n',
    ],
)
def test_file_that_does_not_parse_has_no_docstrings(content: str | bytes, tmp_path: Path) -> None:
    """A file that is not Python, not text, empty or blank gives no docstrings and no error."""
    assert read_text(tmp_path, content) == []


def test_declared_encoding_is_used(tmp_path: Path) -> None:
    """A file that declares its encoding is read in it."""
    text = '# -*- coding: latin-1 -*-\n"""Résumé."""\n'.encode("latin-1")
    assert [docstring.text for docstring in read_text(tmp_path, text)] == ["Résumé."]


def test_missing_file_has_no_docstrings(tmp_path: Path) -> None:
    """A file can be listed in RECORD and not exist."""
    assert parse_docstrings(("package", tmp_path, "nothing.py")) == []


def test_invalid_escape_does_not_warn(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Parsing a source file with an invalid escape gives no warning."""
    assert len(read_text(tmp_path, '"""A \\d pattern."""\n')) == 1
    assert not recwarn.list


# --- which files -----------------------------------------------------------------------------------------------------

SKIPPED = [
    "pkg/tests/helper.py",
    "pkg/test/helper.py",
    "pkg/testing/helper.py",
    "pkg/_vendor/copied.py",
    "pkg/test_a.py",
    "pkg/a_test.py",
    "../bin/tool.py",
]


def test_test_folders_and_copies_are_skipped(site: Path) -> None:
    """Tests, vendored copies and files outside the distribution's folder are skipped."""
    kept = ["pkg/__init__.py", "pkg/contest.py", "pkg/latest/module.py"]
    install(site, "some-pkg", [*kept, *SKIPPED, "pkg/data.txt"])
    assert SKIPPED
    files = [(package, path) for package, _, path in list_source_files(["some-pkg"]) if package != STANDARD_LIBRARY]
    assert files == [("some-pkg", path) for path in sorted(kept)]


def test_standard_library_is_read_without_its_tests() -> None:
    """Standard library files are listed; its tests and site-packages are not."""
    files = [path for package, _, path in list_source_files([]) if package == STANDARD_LIBRARY]
    assert {"ast.py", "json/decoder.py"} <= set(files)
    assert not [path for path in files if {"test", "tests", "site-packages"}.intersection(Path(path).parts[:-1])]


def test_missing_distribution_has_no_files() -> None:
    """An unknown name adds no files."""
    assert list_source_files(["there-is-no-such-distribution"]) == list_source_files([])


def test_files_are_read_in_order(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes read the files; one list per file is returned, in the order of the files."""
    install(site, "leaf-dist", [f"leaf/module_{index:03}.py" for index in range(100)])
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(site / "no standard library")})
    lists = list(extract_docstrings(list_source_files(["leaf-dist"]), workers=2))
    assert [docstring.text for docstrings in lists for docstring in docstrings] == [
        f"leaf/module_{index:03}.py" for index in range(100)
    ]


# --- pairs -----------------------------------------------------------------------------------------------------------


def docstring(summary: str, body: str = BODY, between: str = "\n\n") -> Docstring:
    """Return a docstring with this summary line and body."""
    return Docstring("package", "module.py:f", summary + between + body)


def test_pair_is_the_body_and_the_summary_line() -> None:
    """The summary is the first line and the article the rest; both are stripped."""
    pair = build_pair(docstring("Return the sum of two numbers."))
    assert pair is not None
    assert (pair.package, pair.location) == ("package", "module.py:f")
    assert pair.summary == "Return the sum of two numbers."
    assert pair.article == BODY.strip()
    assert pair.summary not in pair.article


SHORT, LONG = SUMMARY_CHARS
NO_PAIRS = {
    "no blank line": docstring("Return the sum of two numbers.", between="\n"),
    "no body": Docstring("package", "m:f", "Return the sum of two numbers."),
    "short body": docstring("Return the sum of two numbers.", "x" * (MIN_BODY_CHARS - 1)),
    "no full stop": docstring("Return the sum of two numbers"),
    "question": docstring("Return the sum of two numbers?"),
    "three words": docstring("Returns everything immediately."),
    "short summary": docstring("A b c d."),
    "one letter short": docstring("A b c " + "d" * (SHORT - 8) + "."),
    "one letter long": docstring("A b c " + "d" * (LONG - 6) + "."),
    "starts with a sign": docstring("*args and kwargs are passed on."),
    "starts with a digit": docstring("2D arrays are taken as they are."),
}
PAIRS = {
    "shortest body": docstring("Return the sum of two numbers.", "x" * MIN_BODY_CHARS),
    "shortest summary": docstring("A b c " + "d" * (SHORT - 7) + "."),
    "longest summary": docstring("A b c " + "d" * (LONG - 7) + "."),
    "four words": docstring("Returns everything almost immediately."),
    "blank line of spaces": docstring("Return the sum of two numbers.", between="\n   \n"),
}


@pytest.mark.parametrize("name", NO_PAIRS)
def test_docstring_without_a_usable_summary_is_not_a_pair(name: str) -> None:
    """Each rule alone excludes a docstring."""
    assert build_pair(NO_PAIRS[name]) is None


@pytest.mark.parametrize("name", PAIRS)
def test_docstring_at_a_limit_is_a_pair(name: str) -> None:
    """The limits of the rules are inclusive."""
    assert build_pair(PAIRS[name]) is not None


def test_cases_are_at_the_limits() -> None:
    """Check that the cases above are exactly at the limits."""
    lengths = {name: len(case.text.split("\n")[0]) for name, case in (NO_PAIRS | PAIRS).items()}
    assert lengths["one letter short"] == SHORT - 1
    assert lengths["shortest summary"] == SHORT
    assert lengths["longest summary"] == LONG
    assert lengths["one letter long"] == LONG + 1


def test_normalization_ignores_case_spaces_and_punctuation() -> None:
    """Only letters and digits distinguish two texts."""
    assert normalize_text("Return the\n  *sum*, of 2.") == normalize_text("return THE sum of 2")
    assert normalize_text("sum of 2") != normalize_text("sum of 3")
    assert re.fullmatch(r"[a-z0-9]*", normalize_text("É, ß & 12!"))
