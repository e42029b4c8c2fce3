"""chrF, by the package sacrebleu."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from peftbench.evaluation.metrics.corpus_metric import CorpusMetric
from peftbench.record import ScoreDefinition

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric as SacrebleuMetric


class Chrf(CorpusMetric):
    """ChrF2 (Popović 2015, chrF: character n-gram F-score for automatic MT evaluation)."""

    name: ClassVar[str] = "chrf"
    scores: Mapping[str, ScoreDefinition] = {
        "chrf": ScoreDefinition(
            title="chrF",
            description="chrF2 of all generated texts together (sacrebleu)",
            unit="chrF",
            digits=1,
            higher_is_better=True,
            low=0,
            high=100,
        )
    }

    def _build(self) -> SacrebleuMetric:
        from sacrebleu.metrics import CHRF

        return CHRF()
