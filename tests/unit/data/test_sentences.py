"""Where a sentence ends."""

from __future__ import annotations

from peftbench.data.sentences import split_prose_sentences, split_sentences

TEXT = "Compute the path between source and all other\nreachable nodes. It may fail.\n\nNotes\n-----\nG : graph"


def test_lines_end_sentences_of_a_list() -> None:
    """For ROUGE-Lsum, whose texts have a sentence a line, a line break ends one."""
    assert split_sentences("One. Two\nthree\n") == ["One.", "Two", "three"]


def test_lines_do_not_end_sentences_of_prose() -> None:
    """In an article a line ends where it was full; only a blank line ends a sentence that has no full stop."""
    assert split_prose_sentences(TEXT) == [
        "Compute the path between source and all other reachable nodes.",
        "It may fail.",
        "Notes ----- G : graph",
    ]
