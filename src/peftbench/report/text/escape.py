"""Escape untrusted text, e.g. run names and summaries, for terminals, Markdown and spreadsheets."""

from __future__ import annotations

import re
import unicodedata

_MARKDOWN_CHARS = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")  # an underscore between letters is not emphasis
_AUTOLINK = re.compile(r":(?=//)|(?<=www)\.", re.IGNORECASE)
_EMAIL_AT_SIGN = re.compile(r"(?<=[\w.+-])@(?=[\w.\\-])")
"""GitHub links mail addresses after it removes backslashes; only a comment before the @ prevents that."""

_HTML_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_LINE_START_MARKUP = re.compile(r"[#=]|[-+](?=[-\s]|$)|(?<=\d)[.)](?=\s|$)")
"""Markup that, at the start of a line (or after a number there), makes a heading, a rule or a list."""


def terminal_safe(text: str) -> str:
    """Return ``text`` on one line, with characters escaped that could move the cursor or change the text direction."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def escaped_line(text: str) -> str:
    """Return ``text`` on one line, with single spaces and escaped control characters."""
    line = " ".join(text.split())
    if line.isprintable():
        return line
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) == "Cc" else c for c in line)


def printable_line(text: str) -> str:
    """Return ``text`` on one line, with single spaces and without unprintable characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def escape_markdown(text: str) -> str:
    """Return one line of Markdown that shows ``text`` literally, also in a table: no markup, HTML or links."""
    line = escaped_line(text)
    number = re.match(r"\d*", line)
    start = number.end() if number else 0
    opens = _LINE_START_MARKUP.match(line, start) is not None and (start > 0) == (line[start] in ".)")
    shown = _AUTOLINK.sub(r"\\\g<0>", _MARKDOWN_CHARS.sub(r"\\\g<0>", line))
    for char, entity in _HTML_ENTITIES.items():
        shown = shown.replace(char, entity)
    shown = _EMAIL_AT_SIGN.sub("<!-- -->@", shown)
    # ``start`` is still valid: only digits precede it, which are never escaped.
    return f"{shown[:start]}\\{shown[start:]}" if opens else shown


def escape_spreadsheet_formula(value: str) -> str:
    """Prefix an apostrophe if a spreadsheet could read the text as a formula."""
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
