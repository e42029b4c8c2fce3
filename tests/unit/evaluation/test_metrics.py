"""Every metric against values computed by hand or by its library."""

from __future__ import annotations

import math
import statistics

import numpy
import pytest

from peftbench.errors import MetricError
from peftbench.evaluation.intervals import bootstrap_interval, paired_interval
from peftbench.evaluation.metrics.bleu import Bleu
from peftbench.evaluation.metrics.choice_accuracy import ChoiceAccuracy
from peftbench.evaluation.metrics.chrf import Chrf
from peftbench.evaluation.metrics.classification import Classification
from peftbench.evaluation.metrics.exact_match import ExactMatch
from peftbench.evaluation.metrics.jackknife import compute_pseudo_values
from peftbench.evaluation.metrics.numeric_answer import NumericAnswer
from peftbench.evaluation.metrics.perplexity import Perplexity
from peftbench.evaluation.metrics.registry import METRICS
from peftbench.evaluation.outputs import ChoiceScore, Output

HYPOTHESES = ["the cat sat on the mat", "a dog barks loudly at night", "it rains", "we went home early today"]
REFERENCES = ["the cat is on the mat", "a dog barks at night", "it rained all day", "we went home early today"]
LABELS = ["a", "a", "a", "b", "b", "c"]
PREDICTED = ["a", "b", "a", "b", "nonsense", "a"]


def mean_scores(values: dict[str, tuple[float, ...]]) -> dict[str, float]:
    """Return the scores, which are the means of the values."""
    return {name: statistics.fmean(one) for name, one in values.items()}


def test_scores_have_unique_names_and_titles() -> None:
    """Names are keys of the record, titles are columns of the table."""
    names = [name for metric in METRICS.values() for name in metric.scores]
    titles = [score.title for metric in METRICS.values() for score in metric.scores.values()]
    assert len(names) == len(set(names)) > 10
    assert len(titles) == len(set(titles))
    assert all(score.description for metric in METRICS.values() for score in metric.scores.values())


@pytest.mark.parametrize(
    ("generated", "reference", "expected"),
    [
        ("The  Bridge, over a river!", "bridge over the river", 100),
        ("bridge over river", "bridges over river", 0),
        ("theater", "ater", 0),
        ("", "the", 100),
        ("3.5", "35", 100),  # SQuAD drops the point too
    ],
)
def test_exact_match_normalizes_as_squad_does(generated: str, reference: str, expected: float) -> None:
    """Case, punctuation, a, an, the, and repeated spaces do not count."""
    assert ExactMatch().score_texts([generated], [reference]) == {"exact_match": (expected,)}


@pytest.mark.parametrize(
    ("generated", "strict", "flexible"),
    [
        ("2 and 2 are 4.\n#### 72", True, True),
        ("#### $72.00", True, True),
        ("#### 72 and then 5", True, False),
        ("So the answer is 72.", False, True),
        ("72, no: 71", False, False),
        ("#### 71, or 72", False, True),
        ("144/2", False, True),
        ("from 10-72", False, True),
        ("-72", False, False),
        ("#### none", False, False),
        ("7" * 5000, False, False),
        ("", False, False),
    ],
)
def test_numeric_answer_is_strict_and_flexible(generated: str, strict: bool, flexible: bool) -> None:
    """Strict takes the number after ####, flexible the last number; the reference is 72."""
    scores = NumericAnswer().score_texts([generated], ["He sold 48 and 24.\n#### 72"])
    assert scores == {"answer_strict": (100.0 * strict,), "answer_flexible": (100.0 * flexible,)}


@pytest.mark.parametrize(
    ("number", "reference"), [("1,000", "1000.0"), ("3/4", "0.75"), ("1,234,567", "#### 1234567"), (".5", "1/2")]
)
def test_equal_numbers_are_recognized(number: str, reference: str) -> None:
    """Separators, decimals and fractions are read as numbers."""
    assert NumericAnswer().score_texts([f"It is {number}."], [reference])["answer_flexible"] == (100.0,)


def test_choice_accuracy_by_likelihood_and_per_byte() -> None:
    """-6 is above -8, but per byte -8 / 8 is above -6 / 2: the long choice wins only after normalization."""
    choices = (
        ChoiceScore(text="no", log_likelihood=-6.0, num_tokens=1, num_bytes=2),
        ChoiceScore(text="possibly", log_likelihood=-8.0, num_tokens=2, num_bytes=8),
    )
    outputs = [Output(id=str(answer), reference="", choices=choices, answer=answer) for answer in (0, 1)]
    assert ChoiceAccuracy().compute(outputs) == {"accuracy": (100.0, 0.0), "accuracy_norm": (0.0, 100.0)}


def test_classification_matches_hand_computed_values() -> None:
    """F1 of a is 2*2/(3+3) = 2/3, of b 2*1/(2+2) = 1/2, of c 0; any other text is wrong."""
    scores = mean_scores(Classification().score_texts([" A ", *PREDICTED[1:]], LABELS))
    assert scores == pytest.approx({"label_accuracy": 50, "macro_f1": 100 * (2 / 3 + 1 / 2) / 3})


def test_references_that_are_no_labels_are_refused() -> None:
    """More than 1,000 labels have one sentence with the metric to use instead."""
    texts = [str(number) for number in range(1001)]
    with pytest.raises(MetricError, match=r"at most 1,000 labels, and the references have 1,001; use exact_match"):
        Classification().score_texts(texts, texts)


def test_corpus_scores_equal_those_of_sacrebleu() -> None:
    """The mean of the values is sacrebleu's corpus score, which is not the mean of its sentence scores."""
    from sacrebleu.metrics import BLEU, CHRF

    for metric, library in ((Bleu(), BLEU()), (Chrf(), CHRF())):
        expected = library.corpus_score(HYPOTHESES, [REFERENCES]).score
        score = mean_scores(metric.score_texts(HYPOTHESES, REFERENCES))[metric.name]
        assert score == pytest.approx(expected)
        pairs = zip(HYPOTHESES, REFERENCES, strict=True)
        sentences = [library.sentence_score(one, [other]).score for one, other in pairs]
        assert abs(statistics.fmean(sentences) - expected) > 1


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    """The mean of the values is exp of the sum of losses over the sum of tokens."""
    losses, labeled = (2.0, 9.0, 4.0), (1, 5, 2)
    score = mean_scores(Perplexity().compute_from_losses(losses, labeled))
    assert score == pytest.approx({"perplexity": math.exp(15 / 8)})


def test_pseudo_values_of_a_mean_are_the_values() -> None:
    """For a mean over examples the jackknife changes nothing."""
    values = numpy.array([[1.0, 1.0], [4.0, 1.0], [7.0, 1.0]])
    assert compute_pseudo_values(values, lambda sums: float(sums[0] / sums[1])) == pytest.approx((1.0, 4.0, 7.0))
    assert compute_pseudo_values(values[:1], lambda sums: float(sums[0] / sums[1])) == (1.0,)


def draw_labels(count: int, seed: int, accuracy: float) -> tuple[list[str], list[str]]:
    """Return predictions and references over three labels; one is rare."""
    random = numpy.random.default_rng(seed)
    references = random.choice(["a", "b", "c"], size=count, p=[0.6, 0.3, 0.1])
    wrong = random.choice(["a", "b", "c"], size=count)
    return list(numpy.where(random.random(count) < accuracy, references, wrong)), list(references)


def compute_macro_f1(predicted: list[str], expected: list[str], labels: list[str]) -> float:
    """Return macro-F1 in percent, label by label."""
    scores = []
    for label in labels:
        hits = sum(one == other == label for one, other in zip(predicted, expected, strict=True))
        used = predicted.count(label) + expected.count(label)
        scores.append(2 * hits / max(used, 1))
    return 100 * statistics.fmean(scores)


def test_interval_of_macro_f1_is_that_of_resampled_examples() -> None:
    """Bootstrapping the values gives the interval of computing macro-F1 again from each resample, within a tenth."""
    predicted, expected = draw_labels(300, seed=1, accuracy=0.7)
    values = Classification().score_texts(predicted, expected)["macro_f1"]
    random, scores = numpy.random.default_rng(2), []
    for _ in range(1000):
        rows = random.integers(300, size=300)
        scores.append(
            compute_macro_f1([predicted[row] for row in rows], [expected[row] for row in rows], ["a", "b", "c"])
        )
    low, high = numpy.quantile(scores, [0.025, 0.975])
    interval = bootstrap_interval(values, 1000)
    assert interval.mean == pytest.approx(compute_macro_f1(predicted, expected, ["a", "b", "c"]))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_paired_interval_of_bleu_is_that_of_sacrebleus_bootstrap() -> None:
    """The interval of a difference in BLEU agrees with resampling the examples of both systems, within a tenth."""
    from sacrebleu.metrics import BLEU

    random = numpy.random.default_rng(3)
    tokens = [f"w{number}" for number in range(30)]
    references = [list(random.choice(tokens, size=12)) for _ in range(200)]

    def corrupt(rate: float) -> list[str]:
        return [
            " ".join(random.choice(tokens) if random.random() < rate else token for token in reference)
            for reference in references
        ]

    texts, systems = [" ".join(reference) for reference in references], [corrupt(0.15), corrupt(0.2)]
    first, second = [numpy.array(Bleu().score_texts(system, texts)["bleu"]) for system in systems]
    interval = paired_interval(list(first - second))
    metric = BLEU()
    counts = [numpy.array(metric._extract_corpus_statistics(system, [texts])) for system in systems]
    differences = []
    for _ in range(1000):
        rows = random.integers(200, size=200)
        scores = [metric._compute_score_from_stats(one[rows].sum(axis=0).tolist()).score for one in counts]
        differences.append(scores[0] - scores[1])
    low, high = numpy.quantile(differences, [0.025, 0.975])
    assert interval.mean == pytest.approx(
        metric.corpus_score(systems[0], [texts]).score - metric.corpus_score(systems[1], [texts]).score
    )
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.1 * (high - low))
