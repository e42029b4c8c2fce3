"""ROUGE scores in percent, computed offline."""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

from peftbench.evaluation.metrics.rouge import Rouge

KINDS = {"rouge1", "rouge2", "rougeL", "rougeLsum"}
TEXTS = ["The river rose over the bridge.", "A council voted on its budget. The vote was close."]
OTHERS = ["Ein Zug fuhr nach Norden.", "Niemand kam zur Schule. Alles blieb still."]


def _means(generated: list[str], references: list[str]) -> dict[str, float]:
    return {kind: statistics.mean(scores) for kind, scores in Rouge().score_texts(generated, references).items()}


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
    scores = Rouge().score_texts([TEXTS[0], OTHERS[0]], [TEXTS[0], TEXTS[1]])["rouge1"]
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


IN_OTHER_SCRIPTS = {
    "Russian": "Совет города решил закрыть мост.",
    "Greek": "Η γέφυρα έκλεισε για επισκευή.",
    "Arabic": "أغلق المجلس الجسر للإصلاح.",
    "Hindi": "परिषद ने पुल बंद किया।",
    "Chinese": "市议会决定关闭这座桥。",
    "Japanese": "市議会は橋を閉鎖した。",
    "Thai": "สภาเมืองปิดสะพาน",
    "Korean": "시의회가 다리를 폐쇄했다.",
    "Hebrew": "המועצה סגרה את הגשר.",
    "emoji": "🌉 🚧 ✅",
    "German": "Größere Brücken müssen schließen.",
}


@pytest.mark.parametrize("script", IN_OTHER_SCRIPTS)
def test_identical_texts_of_any_script_score_100(script: str) -> None:
    """rouge_score drops all letters but a-z."""
    text = IN_OTHER_SCRIPTS[script]
    assert _means([text], [text]) == dict.fromkeys(KINDS, 100.0)


@pytest.mark.parametrize("script", IN_OTHER_SCRIPTS)
def test_texts_that_share_a_digit_do_not_score_100(script: str) -> None:
    """The letters count, not only the digit."""
    assert 0 < _means([f"{IN_OTHER_SCRIPTS[script]} 7"], ["Nothing else is equal 7"])["rouge1"] < 40


@pytest.mark.parametrize(
    ("generated", "reference", "expected"),
    [
        ("Мост закрыт", "Мост открыт", 50),
        ("关闭桥", "关闭门", 100 * 2 / 3),
        ("МОСТ", "мост", 100),
        ("cafe\u0301 noir", "caf\u00e9 noir", 100),
        ("réunions votes", "réunions voting", 100),
        ("été", "ete", 0),
    ],
    ids=["spaces", "no spaces", "case", "composition", "stem", "accent"],
)
def test_scores_of_other_scripts_match_hand_computed_values(generated: str, reference: str, expected: float) -> None:
    """Tokens are characters in scripts without spaces; ASCII tokens are stemmed in any text."""
    assert _means([generated], [reference])["rouge1"] == pytest.approx(expected)


def test_ascii_texts_score_as_rouge_score() -> None:
    """To the last digit, on random texts with every ASCII character."""
    import random

    from rouge_score.rouge_scorer import RougeScorer

    generator = random.Random(4)  # noqa: S311
    parts = [
        "votes",
        "voting",
        "bridge's",
        "re-opened",
        "a_b",
        "C3PO",
        "42",
        "!",
        "\t",
        "(x)",
        "running",
        "runs.",
        "The",
    ]
    texts = [" ".join(generator.choices(parts, k=12)) for _ in range(40)]
    texts += ["".join(chr(generator.randrange(128)) for _ in range(60)) for _ in range(40)]
    others = generator.sample(texts, len(texts))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = Rouge().score_texts(texts, others)
    for kind in ("rouge1", "rouge2"):
        expected = [
            100 * scorer.score(other.replace("\n", " "), text.replace("\n", " "))[kind].fmeasure
            for text, other in zip(texts, others, strict=True)
        ]
        assert list(scores[kind]) == expected
    assert len(set(scores["rouge1"])) > 10


def test_metric_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs cannot meet in a shared cache, whose locks some network disks do not hold."""
    import evaluate.config

    for name in ("HF_METRICS_CACHE", "HF_EVALUATE_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(evaluate.config, name, str(tmp_path / name), raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert _means(TEXTS, TEXTS)["rouge1"] == 100
    assert list(tmp_path.iterdir()) == []


_EVALUATIONS_WITHOUT_LOCKS = """
import errno
import fcntl
import json
import os
import sys
import tempfile
import time
from pathlib import Path

meeting = Path(sys.argv[1])

from peftbench.evaluation.metrics.rouge import Rouge

compute_rouge = Rouge().score_texts
shared = ["The river rose over the bridge."] * 200
compute_rouge(shared, shared)  # imports the libraries, which create folders
tempfile.tempdir = os.environ["HF_HOME"]
first_process = os.fork()  # the second process need not import the libraries again
name, other = ("a", "b") if first_process else ("b", "a")
own = [f"{name} term{index}" for index in range(200)]


def ignore(*_):
    return None


def fail(*_):
    raise OSError(errno.ENOLCK, "No locks available")


means = {}
for kind, lock in {"ignored": ignore, "failing": fail}.items():
    fcntl.flock = fcntl.lockf = lock
    (meeting / f"{kind} {name}").touch()
    deadline = time.monotonic() + 30
    while not (meeting / f"{kind} {other}").exists():
        assert time.monotonic() < deadline, f"{other} failed"
        time.sleep(0.001)
    scores = [compute_rouge(own if index % 2 else shared, own)["rouge1"] for index in range(6)]
    means[kind] = [sum(values) / len(values) for values in scores]
(meeting / f"{name}.json").write_text(json.dumps(means))
if first_process:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(first_process, 0)[1]))
"""


@pytest.mark.slow
def test_two_evaluations_at_once_without_locks(tmp_path: Path, caches: dict[str, str]) -> None:
    """Each of two processes computes its own scores and leaves no file, where locks are ignored and where they fail."""
    libraries, meeting = tmp_path / "libraries", tmp_path / "meeting"
    libraries.mkdir()
    meeting.mkdir()
    subprocess.run(
        [sys.executable, "-c", _EVALUATIONS_WITHOUT_LOCKS, str(meeting)],
        env=caches | {"HF_HOME": str(libraries)},
        timeout=120,
        check=True,
    )
    outputs = [(meeting / f"{name}.json").read_text(encoding="utf-8") for name in ("a", "b")]
    alternating = [pytest.approx(0), pytest.approx(100)] * 3
    assert [json.loads(output) for output in outputs] == [{"ignored": alternating, "failing": alternating}] * 2
    assert list(libraries.rglob("*")) == []
