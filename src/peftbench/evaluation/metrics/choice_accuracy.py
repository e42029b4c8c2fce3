"""Accuracy over choices, each with the log-likelihood that the model gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from peftbench.evaluation.metrics.base import Metric, Needs
from peftbench.record import ScoreDefinition
from peftbench.record.quality import PERCENT

if TYPE_CHECKING:
    from peftbench.evaluation.outputs import ChoiceScore, Output


class ChoiceAccuracy(Metric):
    """The most likely choice is right, as in lm-evaluation-harness (Gao et al. 2021).

    ``accuracy`` compares log-likelihoods, ``accuracy_norm`` log-likelihoods per byte, since a long choice has a low
    likelihood by its length alone; the harness's acc_norm counts characters, the same for ASCII. The first of equally
    likely choices counts.
    """

    name: ClassVar[str] = "choice_accuracy"
    needs: ClassVar[Needs] = "choices"
    scores: Mapping[str, ScoreDefinition] = {
        name: ScoreDefinition(
            title=title,
            description=f"Examples whose right choice has the highest log-likelihood{suffix}, in percent",
            unit=PERCENT,
            digits=1,
            higher_is_better=True,
            low=0,
            high=100,
        )
        for name, title, suffix in (
            ("accuracy", "accuracy", ""),
            ("accuracy_norm", "accuracy, length-normalized", " per byte"),
        )
    }

    def compute(self, outputs: Sequence[Output]) -> dict[str, tuple[float, ...]]:
        return {
            "accuracy": _score(outputs, lambda choice: choice.log_likelihood),
            "accuracy_norm": _score(outputs, lambda choice: choice.log_likelihood / max(1, choice.num_bytes)),
        }


def _score(outputs: Sequence[Output], get_value: Callable[[ChoiceScore], float]) -> tuple[float, ...]:
    """Return 100 for each example whose right choice has the highest value, else 0."""
    values = [[get_value(choice) for choice in output.choices or ()] for output in outputs]
    pairs = zip(values, outputs, strict=True)
    return tuple(100.0 * (one.index(max(one)) == output.answer) for one, output in pairs)
