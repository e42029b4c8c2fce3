"""ROUGE scores in percent, computed offline."""

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


def test_identical_texts_score_100() -> None:
    """This holds for every kind of ROUGE."""
    assert _means(TEXTS, TEXTS) == dict.fromkeys(KINDS, 100.0)


def test_disjoint_texts_score_0() -> None:
    """This holds for every kind of ROUGE, and for empty texts."""
    assert _means(OTHERS, TEXTS) == dict.fromkeys(KINDS, 0.0)
    assert _means(["", ""], TEXTS) == dict.fromkeys(KINDS, 0.0)


def test_scores_match_hand_computed_values() -> None:
    """Unigrams: precision 2/3 and recall 1, so F1 is 0.8. Bigrams: precision 1/2 and recall 1."""
    means = _means(["the river rose"], ["the river"])
    assert means == pytest.approx({"rouge1": 80, "rouge2": 100 * 2 / 3, "rougeL": 80, "rougeLsum": 80})


def test_words_are_stemmed() -> None:
    """Two forms of a verb match."""
    assert _means(["votes"], ["voting"])["rouge1"] == 100


def test_rouge_lsum_ignores_the_order_of_sentences() -> None:
    """Reordered sentences lower rougeL and not rougeLsum; peftbench's own splitter finds the sentences."""
    means = _means(["The vote was close. The river rose."], ["The river rose. The vote was close."])
    assert means["rouge1"] == means["rougeLsum"] == 100
    assert means["rougeL"] < 100


def test_each_text_is_scored_with_its_own_reference() -> None:
    """Reordering the references changes the scores."""
    scores = compute_rouge([TEXTS[0], OTHERS[0]], [TEXTS[0], TEXTS[1]])["rouge1"]
    assert scores == (100, 0)
    assert _means(TEXTS, TEXTS[::-1])["rouge1"] < 50


def test_rouge_works_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metric opens no connection: with sockets blocked it gives the same scores."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise OSError("there is no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert _means(TEXTS, TEXTS) == dict.fromkeys(KINDS, 100.0)
