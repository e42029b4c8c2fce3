"""The search for banned words and phrases."""

import pytest

from tests.unit.docs.banned_words import PATTERNS, Pattern
from tests.unit.docs.prose import check, find_banned, list_files


def test_repository_has_no_banned_phrase() -> None:
    """Check all files of source, tests, docs and recipes."""
    findings = check(list_files())
    assert not findings, f"{len(findings)} banned phrases:\n" + "\n".join(findings[:50])


def test_list_of_patterns_is_not_empty() -> None:
    """Check that there are patterns; the parametrized test below is skipped without any."""
    assert PATTERNS


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.regex)
def test_example_is_reported_and_rewrite_is_not(pattern: Pattern) -> None:
    """Check that each pattern reports its example, on the right line, and not its own rewrite."""
    findings = list(find_banned("first line\n" + pattern.example, [pattern]))
    assert findings
    assert findings[0][0] == 2
    assert findings[0][2] == pattern.rewrite
    assert not list(find_banned(pattern.rewrite, [pattern]))


@pytest.mark.parametrize(
    "text",
    [
        "for example 16GiB",
        "frequent words in random order",
        "handle.tell()",
        "family",
        "the key is no longer valid",
        "there is no checkpoint",
        "too close to say",
        "the same order, as in training",
        "figure h3 { margin-top: 0; }",
    ],
)
def test_allowed_uses_are_not_reported(text: str) -> None:
    """Check allowed uses of ambiguous phrases, and plain text."""
    assert not list(find_banned(text))


def test_scan_covers_every_kind_of_text() -> None:
    """Check that source, docs, recipes, launch scripts and benchmarks are scanned and the list itself is not."""
    names = list_files()
    for prefix in ("src/", "docs/", "recipes/", "launch/", "benchmarks/", "README.md", "CONTRIBUTING.md"):
        assert any(name.startswith(prefix) for name in names), prefix
    for suffix in (".py", ".md", ".yaml", ".jinja", ".css", ".js", ".sbatch"):
        assert any(name.endswith(suffix) for name in names), suffix
    assert "tests/unit/docs/banned_words.py" not in names
