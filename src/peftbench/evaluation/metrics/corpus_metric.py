"""The base class of metrics of the package sacrebleu."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy

from peftbench.evaluation.metrics.base import TextMetric
from peftbench.evaluation.metrics.jackknife import compute_pseudo_values

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from sacrebleu.metrics.base import Metric as SacrebleuMetric


class CorpusMetric(TextMetric):
    """A metric of sacrebleu: one score of all texts together, from summed counts."""

    library: ClassVar[str | None] = "sacrebleu"

    @abstractmethod
    def _build(self) -> SacrebleuMetric:
        """Return sacrebleu's metric with its default settings, which make scores comparable between papers."""

    def score_texts(self, generated: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
        metric = self._build()
        # What sacrebleu's own bootstrap test uses: counts by text, and the score of their sums.
        counts = metric._extract_corpus_statistics(list(generated), [list(references)])

        def compute_score(sums: NDArray[numpy.float64]) -> float:
            return float(metric._compute_score_from_stats([int(one) for one in sums]).score)

        return {self.name: compute_pseudo_values(numpy.array(counts, dtype=float), compute_score)}
