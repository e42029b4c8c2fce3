"""Baselines: results without training, for comparison with the methods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from pydantic import Field

from peftbench.methods.base import Method, Predictor, Target, freeze

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_T = TypeVar("_T", int, str)


class ZeroShot(Method):
    """The base model as loaded."""

    is_trainable: ClassVar[bool] = False
    keeps_base_frozen: ClassVar[bool] = True
    supports_quantized_base: ClassVar[bool] = True

    kind: Literal["zero_shot"] = "zero_shot"
    """Kind of method."""

    def trainable_parameters(self, base: PreTrainedModel) -> int:
        return 0

    def apply(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        freeze(base.parameters())
        return base


class FewShot(ZeroShot):
    """The base model as loaded, with examples of the training split before each prompt."""

    kind: Literal["few_shot"] = "few_shot"  # type: ignore[assignment]
    """Kind of method."""
    shots: int = Field(default=4, gt=0)
    """Number of training examples before each prompt; the same ones for all."""

    @property
    def num_shots(self) -> int:
        return self.shots


class Lead(Method):
    """The first sentences of the prompt, the strongest simple baseline on news (See et al. 2017 copy three)."""

    is_trainable: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False
    freezes_weights: ClassVar[bool] = False

    kind: Literal["lead"] = "lead"
    """Kind of method."""
    sentences: int = Field(default=3, gt=0)
    """Number of sentences to copy."""

    def build_predictor(self, read_training_targets: Callable[[], list[Target]]) -> Predictor:
        from peftbench.data.sentences import split_prose_sentences

        def predict(prompt: str, choices: Sequence[str]) -> Target:
            return Target(" ".join(split_prose_sentences(prompt)[: self.sentences]))

        return predict


class Majority(Method):
    """The most frequent answer of the training split, whatever the prompt: the floor for classification."""

    is_trainable: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False
    freezes_weights: ClassVar[bool] = False
    predicts_choices: ClassVar[bool] = True
    reads_training_split: ClassVar[bool] = True

    kind: Literal["majority"] = "majority"
    """Kind of method."""

    def build_predictor(self, read_training_targets: Callable[[], list[Target]]) -> Predictor:
        targets = read_training_targets()
        text = _find_most_common([target.text for target in targets])
        counts = Counter(target.choice for target in targets if target.choice is not None)
        ranked = sorted(counts, key=lambda position: (-counts[position], position))

        def predict(prompt: str, choices: Sequence[str]) -> Target:
            if not choices:
                return Target(text)
            index = next((position for position in ranked if position < len(choices)), 0)
            return Target(choices[index], index)

        return predict


def _find_most_common(values: Sequence[_T]) -> _T:
    """Return the most frequent value; of several, the smallest, so that the order of the examples does not matter."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))  # type: ignore[return-value, arg-type]
