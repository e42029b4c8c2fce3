"""The search for banned words and phrases."""

import pytest

from tests.unit.docs.prose import check, find_banned, list_files


def test_repository_has_no_banned_phrase() -> None:
    """Check all files of source, tests, docs and recipes."""
    findings = check(list_files())
    assert not findings, f"{len(findings)} banned phrases:\n" + "\n".join(findings[:50])


@pytest.mark.parametrize(
    "text",
    [
        "def take" + "_up(): ...",
        "the run goes" + " on with its next step",
        "a recipe that cannot\n# be " + "meant",
        '"a budget, as" ' + '", a' + 's 16GiB"',
        "the kn" + "ob of the recipe",
        "this re" + "hearsal is exact",
        '"""' + 'What a run holds."""',
        "the records li" + "e in runs/",
        "a quant" + "ised base",
    ],
)
def test_banned_phrase_is_reported(text: str) -> None:
    """Check that a banned phrase is reported with its line, also across a line break."""
    findings = list(find_banned("first line\n" + text))
    assert findings
    assert findings[0][0] == 2


@pytest.mark.parametrize("text", ["for example 16GiB", "frequent words in random order", "handle.tell()", "family"])
def test_allowed_uses_are_not_reported(text: str) -> None:
    """Check allowed uses of an ambiguous word, and plain text."""
    assert not list(find_banned(text))


def test_scan_covers_every_kind_of_text() -> None:
    """Check that source, docs, recipes, launch scripts and benchmarks are scanned and the list itself is not."""
    names = list_files()
    for prefix in ("src/", "docs/", "recipes/", "launch/", "benchmarks/", "README.md", "CONTRIBUTING.md"):
        assert any(name.startswith(prefix) for name in names), prefix
    assert "tests/unit/docs/banned_words.py" not in names
