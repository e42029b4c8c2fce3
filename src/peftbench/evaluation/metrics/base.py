"""The base class of metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Literal

from peftbench.errors import MetricError, RecordError

if TYPE_CHECKING:
    from peftbench.evaluation.outputs import Output
    from peftbench.record import ScoreDefinition

Needs = Literal["generated", "choices", "losses"]
"""generated: texts; choices: log-likelihoods of choices; losses: the held-out loss of each example."""

NEED_NAMES: dict[Needs, str] = {
    "generated": "generated text",
    "choices": "log-likelihoods of choices",
    "losses": "held-out losses",
}


class Metric(ABC):
    """Computes one or more scores, e.g. a strict and a flexible one."""

    name: ClassVar[str]
    """Name in ``evaluate.metrics``."""
    needs: ClassVar[Needs] = "generated"
    """Input of the computation."""
    library: ClassVar[str | None] = None
    """Package that it imports and that peftbench does not install by default, as pip and Python name it."""
    scores: Mapping[str, ScoreDefinition]
    """Definitions by score name. A name is unique among all metrics."""

    @abstractmethod
    def compute(self, outputs: Sequence[Output]) -> dict[str, tuple[float, ...]]:
        """Return one value per example, by score name. The mean of the values is the score.

        A score that is not a mean over examples has jackknife pseudo-values, see :mod:`.jackknife`.
        """

    def may_have_score(self, score: str) -> bool:
        """True if :meth:`compute` may return a score of this name."""
        return score in self.scores

    def check(self) -> None:
        """Check that the metric can be computed here; called before anything is loaded.

        Raises:
            MetricError: its library is missing, or its code cannot be imported.
        """
        if self.library is not None and find_spec(self.library) is None:
            raise MetricError(
                f"the metric {self.name} needs the package {self.library}, which is not installed",
                f"pip install {self.library}, or leave {self.name} out of evaluate.metrics",
            )

    def import_libraries(self) -> None:
        """Import what :meth:`compute` needs, so that it does not count against a memory budget."""
        if self.library is not None:
            import_module(self.library)

    def check_outputs(self, outputs: Sequence[Output]) -> None:
        """Check that the outputs have what the metric needs.

        Raises:
            RecordError: an output lacks it.
        """
        for output in outputs:
            if getattr(output, self.needs) is None or (self.needs == "choices" and output.answer is None):
                raise RecordError(
                    f"the metric {self.name} needs {NEED_NAMES[self.needs]}, which the outputs lack",
                    "leave the metric out, or evaluate the model with it, without --from-outputs",
                )


class TextMetric(Metric):
    """A metric that compares generated texts with references."""

    @abstractmethod
    def score_texts(self, generated: Sequence[str], references: Sequence[str]) -> dict[str, tuple[float, ...]]:
        """Return one value per text, by score name."""

    def compute(self, outputs: Sequence[Output]) -> dict[str, tuple[float, ...]]:
        """Return the values of the generated texts, by score name."""
        generated = [output.generated for output in outputs if output.generated is not None]
        return self.score_texts(generated, [output.reference for output in outputs])


class LossMetric(Metric):
    """A metric of held-out losses."""

    needs: ClassVar[Needs] = "losses"

    @abstractmethod
    def compute_from_losses(
        self, losses: Sequence[float], labeled_tokens: Sequence[int]
    ) -> dict[str, tuple[float, ...]]:
        """Return one value per example, by score name, from cross-entropies (sums in nats) and numbers of labels."""

    def compute(self, outputs: Sequence[Output]) -> dict[str, tuple[float, ...]]:
        """Refuse: the outputs have no losses."""
        raise TypeError(f"{self.name} is computed from losses")
