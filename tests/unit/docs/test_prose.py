"""The repository's text against the list of banned words and phrases."""

import pytest

from tests.unit.docs.prose import check, find_banned, list_files


def test_repository_has_no_banned_phrase() -> None:
    """Every file of source, tests, docs and recipes is free of the list's phrases."""
    found = check(list_files())
    assert not found, f"{len(found)} banned phrases:\n" + "\n".join(found[:50])


@pytest.mark.parametrize(
    "planted",
    [
        "def take" + "_up(): ...",
        "the run goes" + " on with its next step",
        "a recipe that cannot\n# be " + "meant",
        '"a budget, as" ' + '", as 16' + 'GiB"',
        "the kn" + "ob of the recipe",
        "this re" + "hearsal is exact",
        '"""' + 'What a run holds."""',
        "the records li" + "e in runs/",
        "a quant" + "ised base",
    ],
)
def test_planted_phrase_is_reported(planted: str) -> None:
    """A banned phrase is reported with its line, also across a line break."""
    found = list(find_banned("first line\n" + planted))
    assert found
    assert found[0][0] == 2


@pytest.mark.parametrize("plain", ["for example 16GiB", "frequent words in random order", "handle.tell()", "family"])
def test_allowed_uses_are_not_reported(plain: str) -> None:
    """Allowed uses of an ambiguous word, and plain text, are not reported."""
    assert not list(find_banned(plain))


def test_scan_covers_every_kind_of_text() -> None:
    """Source, docs, recipes, launch scripts and benchmarks are scanned; the list itself is not."""
    names = list_files()
    for prefix in ("src/", "docs/", "recipes/", "launch/", "benchmarks/", "README.md", "CONTRIBUTING.md"):
        assert any(name.startswith(prefix) for name in names), prefix
    assert "tests/unit/docs/banned_words.py" not in names
