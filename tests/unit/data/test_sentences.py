"""Sentence splitting, with line breaks and without."""

from __future__ import annotations

from peftbench.data.sentences import split_prose_sentences, split_sentences

TEXT = "Compute the path between source and all other\nreachable nodes. It may fail.\n\nNotes\n-----\nG : graph"


def test_split_sentences_ends_a_sentence_at_a_line_break() -> None:
    """ROUGE-Lsum expects one sentence per line."""
    assert split_sentences("One. Two\nthree\n") == ["One.", "Two", "three"]


def test_split_prose_sentences_ignores_single_line_breaks() -> None:
    """The lines of an article are wrapped: a sentence without a full stop ends only at a blank line."""
    assert split_prose_sentences(TEXT) == [
        "Compute the path between source and all other reachable nodes.",
        "It may fail.",
        "Notes ----- G : graph",
    ]
