"""Baselines: rows of the comparison that train nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from peftbench.data.sources import Files
from peftbench.methods import BASELINES, METHOD_KINDS, METHODS
from peftbench.methods.base import Method, Target
from peftbench.methods.baselines import FewShot, Lead, Majority, ZeroShot
from peftbench.methods.full import Full
from peftbench.methods.peft_kinds import PRESETS
from peftbench.recipe.schema import Data, Recipe, Train
from peftbench.tasks.completion import Completion
from peftbench.training.data import add_shots, load_split
from tests.helpers.batches import logits, micro_batch
from tests.helpers.training import trainable_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def test_kinds_of_methods_and_baselines_are_distinct() -> None:
    """The default of each class's kind is its key in the registry, and METHOD_KINDS has all registries."""
    assert METHODS
    assert BASELINES
    assert not set(METHODS) & set(BASELINES)
    assert set(METHOD_KINDS) == set(METHODS) | set(BASELINES) | set(PRESETS) | {"peft"}
    assert len(METHOD_KINDS) == len(METHODS) + len(BASELINES) + len(PRESETS) + 1
    assert all(part.model_fields["kind"].default == kind for kind, part in METHOD_KINDS.items())


def test_only_methods_train() -> None:
    """Methods are trainable, baselines are not."""
    assert all(method.is_trainable for method in METHODS.values())
    assert not any(baseline.is_trainable for baseline in BASELINES.values())


def test_zero_shot_logits_equal_those_of_the_base(
    fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """No parameter requires a gradient."""
    model = ZeroShot().apply(fresh_base("gpt2_tied"), tokenizer).eval()
    assert not trainable_parameters(model)
    with torch.no_grad():
        assert torch.equal(logits(model, micro_batch()), logits(fresh_base("gpt2_tied").eval(), micro_batch()))


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [(1, "It rained."), (2, "It rained. The river rose."), (9, "It rained. The river rose. No bridge held.")],
)
def test_lead_predicts_the_first_sentences(sentences: int, expected: str) -> None:
    """A shorter prompt is predicted as a whole."""
    predict = Lead(sentences=sentences).build_predictor(list)
    assert predict("It rained. The river rose.\nNo bridge held.", ()) == Target(expected)


@pytest.mark.parametrize("method", [Full(), ZeroShot(), FewShot()])
def test_methods_with_a_model_have_no_predictor(method: Method) -> None:
    """They generate text with the model."""
    with pytest.raises(TypeError, match="predicts with a model"):
        method.build_predictor(list)


@pytest.mark.parametrize(
    ("targets", "choices", "expected"),
    [
        ([Target("b"), Target("a"), Target("b")], (), Target("b")),
        ([Target("b"), Target("a")], (), Target("a")),  # a tie does not depend on the order of the examples
        ([Target("x", 1), Target("y", 1), Target("z", 0)], ("p", "q"), Target("q", 1)),
        ([Target("x", 3), Target("y", 3), Target("z", 0)], ("p", "q"), Target("p", 0)),
    ],
)
def test_majority_predicts_the_most_frequent_answer(
    targets: list[Target], choices: tuple[str, ...], expected: Target
) -> None:
    """It is a text, or the position of a choice that the example has."""
    assert Majority().build_predictor(lambda: targets)("any prompt", choices) == expected


def test_few_shot_puts_training_examples_before_each_prompt(tmp_path: Path) -> None:
    """The same examples of the training split, drawn with data.seed, precede every prompt; references stay."""
    files = {}
    for split, numbers in (("train", (1, 2, 3)), ("test", (8, 9))):
        files[split] = tmp_path / f"{split}.jsonl"
        rows = ({"prompt": f"{number}+1=", "completion": f" {number + 1}"} for number in numbers)
        files[split].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = Recipe(
        name="run",
        method=FewShot(shots=2),
        data=Data(source=Files(train=str(files["train"]), test=str(files["test"]))),
        train=Train(steps=1),
        task=Completion(),
    )
    shown = add_shots(load_split(recipe, "test"), load_split(recipe, "train"), recipe)
    shots = {prompt.removesuffix(own) for prompt, own in zip(shown["prompt"], ("8+1=", "9+1="), strict=True)}
    assert len(shots) == 1
    assert re.fullmatch(r"(?:[123]\+1= [234]\n\n){2}", shots.pop())
    assert list(shown["completion"]) == [" 9", " 10"]
