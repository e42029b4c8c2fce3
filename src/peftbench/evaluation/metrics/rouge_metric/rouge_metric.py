"""ROUGE for ``evaluate.load`` by path; loading it by name would need the Hub.

The scores are those of the rouge-score package (F-measure, stemmed), one per example.
"""

# One import per line: evaluate's scanner reads "import a, b" as a package named "a,".
import datasets
import evaluate
from rouge_score import rouge_scorer

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class RougeMetric(evaluate.Metric):  # type: ignore[misc]
    """``compute(predictions=..., references=...)`` returns, for each type of ROUGE, one F-measure (0 to 1) per example.

    For rougeLsum, sentences must be separated by line breaks.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE (Lin 2004): overlap of n-grams and longest common subsequences.",
            citation="Lin 2004, ROUGE: a package for automatic evaluation of summaries.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, list[float]]:
        scorer = rouge_scorer.RougeScorer(ROUGE_TYPES, use_stemmer=True)
        scores = [
            scorer.score(reference, prediction) for reference, prediction in zip(references, predictions, strict=True)
        ]
        return {kind: [score[kind].fmeasure for score in scores] for kind in ROUGE_TYPES}
