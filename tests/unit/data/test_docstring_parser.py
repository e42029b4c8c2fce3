"""Docstrings are read from source text, never imported, and become pairs by the rules that are written down."""

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
    resolve_dependencies,
)

BODY = "This paragraph says more about it, at some length. " * 4


def read_text(folder: Path, text: str | bytes) -> list[Docstring]:
    """What is read from a file of this content."""
    path = folder / "module.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse_docstrings(("package", folder, "module.py"))


def install(site: Path, name: str, files: Sequence[str] = (), requires: Sequence[str] = ()) -> None:
    """A distribution as an installer leaves it, with ``files`` that hold one docstring each."""
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
    """A folder where distributions can be installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


# --- reading ---------------------------------------------------------------------------------------------------------


def test_reads_every_docstring_with_its_qualified_name(tmp_path: Path) -> None:
    """Modules, classes, functions, coroutines and what lies in them are found in order, and text elsewhere is not."""
    text = '''"""The module."""
x = """a string that is no docstring"""
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
    found = [(docstring.location, docstring.text) for docstring in read_text(tmp_path, text)]
    assert found == [
        ("module.py:<module>", "The module."),
        ("module.py:A", "The class."),
        ("module.py:A.wait", "The coroutine."),
        ("module.py:A.B", "The inner class."),
        ("module.py:f", "The function."),
        ("module.py:f.g", "The inner function."),
        ("module.py:conditional", "The conditional one."),
    ]


def test_nothing_is_imported(tmp_path: Path) -> None:
    """A module that would raise, and write a file, when it is imported is still read, and does neither."""
    text = f'''"""Dangerous."""
open({str(tmp_path / "executed")!r}, "w").close()
raise SystemExit("imported")
def after():
    """Never reached, but read."""
'''
    before = set(sys.modules)
    assert [docstring.text for docstring in read_text(tmp_path, text)] == ["Dangerous.", "Never reached, but read."]
    assert not (tmp_path / "executed").exists()
    assert "module" not in set(sys.modules) - before


def test_indentation_is_taken_away(tmp_path: Path) -> None:
    """The text is what inspect.cleandoc prints: common margin and blank ends removed."""
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
def test_what_does_not_parse_has_no_docstrings(content: str | bytes, tmp_path: Path) -> None:
    """A file that is no Python, no text, empty or blank gives nothing and stops nobody."""
    assert read_text(tmp_path, content) == []


def test_a_declared_encoding_is_obeyed(tmp_path: Path) -> None:
    """A file that declares its encoding is read in it."""
    text = '# -*- coding: latin-1 -*-\n"""Résumé."""\n'.encode("latin-1")
    assert [docstring.text for docstring in read_text(tmp_path, text)] == ["Résumé."]


def test_a_file_that_is_gone_has_no_docstrings(tmp_path: Path) -> None:
    """A file that a record of an installation names and that is not there gives nothing."""
    assert parse_docstrings(("package", tmp_path, "nothing.py")) == []


def test_a_strange_escape_warns_nobody(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Invalid escapes in other people's files are theirs."""
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
    """Of a distribution's files, tests, vendored copies and what lies outside its folder are left out."""
    kept = ["pkg/__init__.py", "pkg/contest.py", "pkg/latest/module.py"]
    install(site, "some-pkg", [*kept, *SKIPPED, "pkg/data.txt"])
    assert SKIPPED
    found = [(package, path) for package, _, path in list_source_files(["some-pkg"]) if package != STANDARD_LIBRARY]
    assert found == [("some-pkg", path) for path in sorted(kept)]


def test_the_standard_library_is_read_without_its_tests() -> None:
    """The standard library's files are found, its tests and the packages installed below it are not."""
    found = [path for package, _, path in list_source_files([]) if package == STANDARD_LIBRARY]
    assert {"ast.py", "json/decoder.py"} <= set(found)
    assert not [path for path in found if {"test", "tests", "site-packages"}.intersection(Path(path).parts[:-1])]


def test_a_distribution_that_is_not_installed_has_no_files() -> None:
    """An unknown name adds nothing."""
    assert list_source_files(["there-is-no-such-distribution"]) == list_source_files([])


def test_the_closure_is_what_is_needed_at_run_time(site: Path) -> None:
    """Requirements are followed by their normal names; extras, other platforms' and absent ones add nothing."""
    install(
        site,
        "top-dist",
        requires=[
            "Mid.Dist>=1",
            'extra-dist; extra == "dev"',
            'other-dist; sys_platform == "no such platform"',
            "absent-dist",
        ],
    )
    install(site, "mid-dist", requires=["leaf_dist", "top-dist"])
    for name in ("leaf-dist", "extra-dist", "other-dist"):
        install(site, name)
    found = resolve_dependencies("top-dist")
    assert {"mid-dist", "leaf-dist"} <= set(found)
    assert not {"extra-dist", "other-dist"} & set(found)
    assert found == sorted(set(found))


def test_harvest_reads_files_in_order(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One list a file comes back in the order of the files, though several processes read them."""
    install(site, "leaf-dist", [f"leaf/module_{index:03}.py" for index in range(100)])
    install(site, "top-dist", requires=["leaf-dist"])
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(site / "no standard library")})
    found = list(extract_docstrings("top-dist", workers=2))
    assert [docstring.text for docstrings in found for docstring in docstrings] == [
        f"leaf/module_{index:03}.py" for index in range(100)
    ]


# --- pairs -----------------------------------------------------------------------------------------------------------


def docstring(summary: str, body: str = BODY, between: str = "\n\n") -> Docstring:
    """A docstring of this summary line and body."""
    return Docstring("package", "module.py:f", summary + between + body)


def test_a_pair_is_the_rest_and_the_summary_line() -> None:
    """Article is the docstring without its first line, summary that line, both without blank ends."""
    made = build_pair(docstring("Return the sum of two numbers."))
    assert made is not None
    assert (made.package, made.location) == ("package", "module.py:f")
    assert made.summary == "Return the sum of two numbers."
    assert made.article == BODY.strip()
    assert made.summary not in made.article


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
def test_what_is_no_pair(name: str) -> None:
    """Each rule alone keeps a docstring from being an example."""
    assert build_pair(NO_PAIRS[name]) is None


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_just_a_pair(name: str) -> None:
    """What lies exactly on a limit is an example."""
    assert build_pair(PAIRS[name]) is not None


def test_limits_are_in_the_cases() -> None:
    """The cases above lie on the limits, not somewhere near them."""
    lengths = {name: len(case.text.split("\n")[0]) for name, case in (NO_PAIRS | PAIRS).items()}
    assert lengths["one letter short"] == SHORT - 1
    assert lengths["shortest summary"] == SHORT
    assert lengths["longest summary"] == LONG
    assert lengths["one letter long"] == LONG + 1


def test_letters_are_what_copies_share() -> None:
    """Case, spaces, line breaks and signs do not make two texts different; letters and digits do."""
    assert normalize_text("Return the\n  *sum*, of 2.") == normalize_text("return THE sum of 2")
    assert normalize_text("sum of 2") != normalize_text("sum of 3")
    assert re.fullmatch(r"[a-z0-9]*", normalize_text("É, ß & 12!"))
