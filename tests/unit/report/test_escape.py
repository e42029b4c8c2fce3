"""Escaping of untrusted text for Markdown, terminals and spreadsheets."""

from __future__ import annotations

import pytest

from peftbench.report.text.escape import (
    escape_markdown,
    escape_spreadsheet_formula,
    escaped_line,
    printable_line,
    terminal_safe,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("prompt_tuning", "prompt_tuning"),
        ("31.2 (30.0–32.5)", "31.2 (30.0–32.5)"),
        ("-0.5", "-0.5"),
        ("12.5 s", "12.5 s"),
        ("_a_ *b*", "\\_a\\_ \\*b\\*"),
        ("a | b\n# c", "a \\| b # c"),
        ("<b>&amp;</b>", "&lt;b&gt;&amp;amp;&lt;/b&gt;"),
        ("`x` [y](z) ~~w~~ \\ $1$", "\\`x\\` \\[y\\](z) \\~\\~w\\~\\~ \\\\ \\$1\\$"),
        ("# a", "\\# a"),
        ("- a", "\\- a"),
        ("+", "\\+"),
        ("---", "\\---"),
        ("===", "\\==="),
        ("12. a", "12\\. a"),
        ("1) a", "1\\) a"),
        ("see https://a.example/x", "see https\\://a.example/x"),
        ("FTP://a.example, WWW.b.example", "FTP\\://a.example, WWW\\.b.example"),
        ("mailto:me@a.example @a", "mailto:me<!-- -->@a.example @a"),
        ("a: b", "a: b"),
        (".", "."),
        ("", ""),
        ("a\x1b[2J\u2028b", "a\\\\x1b\\[2J b"),
    ],
)
def test_escape_markdown_shows_text_literally(text: str, shown: str) -> None:
    """Escape markup and put the text on one line; text that GitHub shows unchanged stays as it is."""
    assert escape_markdown(text) == shown


def test_escape_for_terminal_and_spreadsheet() -> None:
    """Escape control characters, keep text of any language, and put an apostrophe before formulas."""
    assert terminal_safe("a\n\x1b[2J") == "a\\n\\x1b[2J"
    assert escaped_line(" a \n b\x00 نمی\u200cخواهم") == "a b\\x00 نمی\u200cخواهم"
    assert printable_line(" a \n b\x00c \u202e") == "a b c"
    assert [escape_spreadsheet_formula(text) for text in ("=1+1", "+1", "-1", "@a", "\ta", "a=1", "")] == [
        "'=1+1",
        "'+1",
        "'-1",
        "'@a",
        "'\ta",
        "a=1",
        "",
    ]
