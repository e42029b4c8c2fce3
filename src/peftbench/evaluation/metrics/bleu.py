"""BLEU, by the package sacrebleu."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from peftbench.evaluation.metrics.corpus_metric import CorpusMetric
from peftbench.record import ScoreDefinition

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric as SacrebleuMetric


class Bleu(CorpusMetric):
    """BLEU (Papineni et al. 2002, BLEU: a method for automatic evaluation of machine translation) with the settings of
    Post 2018, A call for clarity in reporting BLEU scores.
    """

    name: ClassVar[str] = "bleu"
    scores: Mapping[str, ScoreDefinition] = {
        "bleu": ScoreDefinition(
            title="BLEU",
            description="BLEU of all generated texts together (sacrebleu, tokenizer 13a)",
            unit="BLEU",
            digits=1,
            higher_is_better=True,
            low=0,
            high=100,
        )
    }

    def _build(self) -> SacrebleuMetric:
        from sacrebleu.metrics import BLEU

        return BLEU()
