"""Text that anyone may have written, as a run's name or a summary, for the places in which it is shown."""

from __future__ import annotations

import re
import unicodedata

_MARKDOWN_CHARS = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")  # GitHub takes no underscore within a word for emphasis
_AUTOLINK = re.compile(r":(?=//)|(?<=www)\.", re.IGNORECASE)
_EMAIL_AT_SIGN = re.compile(r"(?<=[\w.+-])@(?=[\w.\\-])")
"""GitHub makes a link of a mail address when backslashes are gone; only what is not text between keeps it from that."""

_HTML_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_LINE_START_MARKUP = re.compile(r"[#=]|[-+](?=[-\s]|$)|(?<=\d)[.)](?=\s|$)")
"""What makes a heading, a rule or a list of a line that begins with it, or with a number and it."""


def terminal_safe(text: str) -> str:
    """``text`` on one line, without what could move a terminal's cursor or turn its writing around."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def escaped_line(text: str) -> str:
    """``text`` with single spaces between its words, and control characters by their numbers: for a text as it is."""
    line = " ".join(text.split())
    if line.isprintable():
        return line
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) == "Cc" else c for c in line)


def printable_line(text: str) -> str:
    """``text`` with single spaces between its words, and without anything that is not printed: for a sentence."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def escape_markdown(text: str) -> str:
    """``text`` on one line of Markdown that shows it as it is, in a table too: no markup, no HTML, no link."""
    line = escaped_line(text)
    number = re.match(r"\d*", line)
    start = number.end() if number else 0
    opens = _LINE_START_MARKUP.match(line, start) is not None and (start > 0) == (line[start] in ".)")
    shown = _AUTOLINK.sub(r"\\\g<0>", _MARKDOWN_CHARS.sub(r"\\\g<0>", line))
    for char, entity in _HTML_ENTITIES.items():
        shown = shown.replace(char, entity)
    shown = _EMAIL_AT_SIGN.sub("<!-- -->@", shown)
    # Nothing before it was escaped: there are digits at most.
    return f"{shown[:start]}\\{shown[start:]}" if opens else shown


def escape_spreadsheet_formula(value: str) -> str:
    """A text that no spreadsheet takes for a formula: an apostrophe goes before what could begin one."""
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
