"""ROUGE in percent, offline."""

from __future__ import annotations

import socket
import statistics
from typing import Any, NoReturn

import pytest

from peftbench.evaluation.metrics.rouge import compute_rouge

KINDS = {"rouge1", "rouge2", "rougeL", "rougeLsum"}
TEXTS = ["The river rose over the bridge.", "A council voted on its budget. The vote was close."]
OTHERS = ["Ein Zug fuhr nach Norden.", "Niemand kam zur Schule. Alles blieb still."]


def _means(generated: list[str], references: list[str]) -> dict[str, float]:
    return {kind: statistics.mean(scores) for kind, scores in compute_rouge(generated, references).items()}


def test_identical_texts() -> None:
    """Texts that are their references score 100 in every kind."""
    assert _means(TEXTS, TEXTS) == dict.fromkeys(KINDS, 100.0)


def test_disjoint_texts() -> None:
    """Texts that share no word with their references score 0 in every kind; so do empty ones."""
    assert _means(OTHERS, TEXTS) == dict.fromkeys(KINDS, 0.0)
    assert _means(["", ""], TEXTS) == dict.fromkeys(KINDS, 0.0)


def test_by_hand() -> None:
    """Two of three words, all of two: precision 2/3, recall 1, so F is 0.8; of word pairs 1 of 2 and 1 of 1."""
    found = _means(["the river rose"], ["the river"])
    assert found == pytest.approx({"rouge1": 80, "rouge2": 100 * 2 / 3, "rougeL": 80, "rougeLsum": 80})


def test_words_are_stemmed() -> None:
    """Words count by their stems."""
    assert _means(["votes"], ["voting"])["rouge1"] == 100


def test_only_rouge_lsum_looks_at_sentences() -> None:
    """Sentences in another order cost rougeL and not rougeLsum, and sentences are found by peftbench's own splitter."""
    found = _means(["The vote was close. The river rose."], ["The river rose. The vote was close."])
    assert found["rouge1"] == found["rougeLsum"] == 100
    assert found["rougeL"] < 100


def test_each_text_meets_its_own_reference() -> None:
    """Scores are of pairs: with the references in another order they are not what they were."""
    found = compute_rouge([TEXTS[0], OTHERS[0]], [TEXTS[0], TEXTS[1]])["rouge1"]
    assert found == (100, 0)
    assert _means(TEXTS, TEXTS[::-1])["rouge1"] < 50


def test_works_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metric asks nothing of any network: with every way to one closed, it gives the same scores."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise OSError("there is no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert _means(TEXTS, TEXTS) == dict.fromkeys(KINDS, 100.0)
