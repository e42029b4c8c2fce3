"""Absolute paths become their last name; other text stays as it is."""

from __future__ import annotations

import pytest

from peftbench.export.privacy import hide_folders, hide_folders_in_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("read from /home/jane/data/rows.jsonl.", "read from rows.jsonl."),
        ("'/srv/a b/x'", "'x'"),
        (r"read from C:\Users\jane\rows.csv", "read from rows.csv"),
        ("see ~/models/base, twice", "see base, twice"),
        ("https://example.org/home/jane/x", "https://example.org/home/jane/x"),
        ("data/rows.jsonl and ../shared/x and 3/4 and a/b", "data/rows.jsonl and ../shared/x and 3/4 and a/b"),
        ("nats/token, 2 / 3, and /", "nats/token, 2 / 3, and /"),
    ],
)
def test_paths_in_a_text(text: str, expected: str) -> None:
    """A path with a space is found because the recipe has it."""
    assert hide_folders_in_text(text, known_paths=["/srv/a b/x", "data/rows.jsonl", "lora"]) == expected


def test_paths_in_a_recipe() -> None:
    """Texts that are absolute paths change, wherever they are; numbers, names and relative paths stay."""
    recipe = {
        "model": {"path": "/models/jane doe/base", "r": 4},
        "train": ["/data/a.jsonl", "b.jsonl"],
        "separator": "\n/x/y:",
        "home": "~/rows.csv",
        "hub": "org/name",
    }
    assert hide_folders(recipe) == {
        "model": {"path": "base", "r": 4},
        "train": ["a.jsonl", "b.jsonl"],
        "separator": "\n/x/y:",
        "home": "rows.csv",
        "hub": "org/name",
    }
