"""Held-out loss, teacher-forced argmax, and what is put together from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from datasets import Dataset

from peftbench.data.encode import Encoder
from peftbench.evaluation.evaluator import Evaluator, build_quality
from peftbench.methods.base import Method
from peftbench.methods.baselines import ZeroShot
from peftbench.methods.full import Full
from peftbench.profiler.probe import Probe
from peftbench.recipe.schema import Evaluate
from peftbench.training.loop import train_step
from tests.helpers.batches import one_batch
from tests.helpers.methods import every_architecture, every_method
from tests.helpers.training import alone, built_around, forget_accelerators, trained, trainer_of
from tests.helpers.workshop import Workshop
from tests.unit.evaluation.conftest import Applied, MakeEvaluation

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

Fresh = Callable[[str], "PreTrainedModel"]


@every_method
@every_architecture
def test_loss_by_hand(
    architecture: str,
    method: Method,
    applied: Applied,
    evaluation: MakeEvaluation,
    encoded: Dataset,
) -> None:
    """The held-out loss is the mean over all summary and end tokens of minus their log-probability.

    It does not depend on the batch, and is not the mean over examples.
    """
    model = applied(method, architecture).eval()
    sums, counts = [], []
    for row in encoded:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, -ids.shape[1] :].double().log_softmax(-1)
        targets = range(row["prompt_tokens"], ids.shape[1])
        sums.append(-sum(scores[position - 1, ids[0, position]].item() for position in targets))
        counts.append(len(targets))
    by_hand = sum(sums) / sum(counts)
    for batch in (1, 3, 16):
        found = evaluation(method, model, batch_size=batch).compute_held_out_loss()
        assert found.loss == pytest.approx(by_hand, rel=1e-5)
        assert found.nll_sums == pytest.approx(sums, rel=1e-4)
        assert found.label_counts == tuple(counts)
    mean_of_means = sum(total / count for total, count in zip(sums, counts, strict=True)) / len(counts)
    assert mean_of_means != pytest.approx(by_hand, rel=1e-4)


def test_an_example_without_a_prompt(applied: Applied, evaluation: MakeEvaluation, encoded: Dataset) -> None:
    """Its first token has nothing before it that could predict it, and is in no loss; the others are as they were."""
    bare = encoded.map(
        lambda row, index: {"prompt_tokens": 0 if index == 2 else row["prompt_tokens"]}, with_indices=True
    )
    model = applied(ZeroShot(), "gpt2_tied")
    measured = evaluation(ZeroShot(), model, bare, batch_size=3)
    found, before = (
        measured.compute_held_out_loss(),
        evaluation(ZeroShot(), model, batch_size=3).compute_held_out_loss(),
    )
    assert found.label_counts[2] == len(encoded[2]["input_ids"]) - 1
    others = [index for index in range(len(encoded)) if index != 2]
    assert [found.label_counts[index] for index in others] == [before.label_counts[index] for index in others]
    assert [found.nll_sums[index] for index in others] == pytest.approx([before.nll_sums[index] for index in others])
    assert len(measured.decode_teacher_forced()) == len(encoded)


def test_a_memorised_example_is_found_again(
    fresh_base: Fresh,
    accelerator: Accelerator,
    encoder: Encoder,
    encoded: Dataset,
    evaluation: MakeEvaluation,
) -> None:
    """Once examples are known by heart, teacher-forced argmax gives each summary back, in the split's order.

    The most likely token at a position must be read one before the token itself, or nothing of this holds.
    """
    model = fresh_base("gpt2_tied")
    measured = evaluation(Full(), model, batch_size=4, max_new_tokens=20)
    known = list(encoded["summary"])
    assert measured.decode_teacher_forced() != known
    batch = measured.collator.collate(encoded["input_ids"], encoded["prompt_tokens"])
    trainer = trainer_of(accelerator, model, torch.optim.AdamW(trained(model).values(), lr=3e-3))
    model.train()
    for _ in range(60):
        loss = train_step(accelerator, trainer, one_batch(batch), max_grad_norm=1.0)
    assert loss < 0.1
    assert measured.decode_teacher_forced() == known
    # Generated, too, where the article was short enough to be whole in the prompt with room for new tokens.
    whole = [encoder.encode_prompt(row["article"]) == row["input_ids"][: row["prompt_tokens"]] for row in encoded]
    pairs = [
        pair for pair, kept in zip(zip(measured.generate_summaries(), known, strict=True), whole, strict=True) if kept
    ]
    assert len(pairs) >= 3
    assert [generated for generated, _ in pairs] == [summary for _, summary in pairs]


def test_quality_is_put_together(applied: Applied, evaluation: MakeEvaluation, encoded: Dataset) -> None:
    """A quality says of how many examples it is, keeps as many samples as asked for, each with its own reference."""
    model = applied(ZeroShot(), "gpt2_tied")
    measured = evaluation(ZeroShot(), model, saved_samples=3, teacher_forced=True)
    quality = measured.evaluate(Probe(torch.device("cpu")))
    assert (quality.split, quality.num_examples) == ("test", 7)
    assert quality.loss == measured.compute_held_out_loss().loss
    assert quality.loss is not None
    assert quality.perplexity == pytest.approx(math.exp(quality.loss))
    assert quality.rouge is not None
    assert quality.teacher_forced_argmax_rouge is not None
    assert set(quality.rouge) == set(quality.teacher_forced_argmax_rouge) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}
    assert [sample.id for sample in quality.samples] == list(encoded["id"])[:3]
    assert [sample.reference for sample in quality.samples] == list(encoded["summary"])[:3]
    assert [sample.generated for sample in quality.samples] == measured.generate_summaries()[:3]
    each = quality.per_example
    assert each is not None
    assert len(each.loss) == len(each.labelled_tokens) == 7
    assert sum(each.loss) / sum(each.labelled_tokens) == pytest.approx(quality.loss)
    assert {kind: sum(scores) / 7 for kind, scores in each.rouge.items()} == pytest.approx(
        {kind: interval.mean for kind, interval in quality.rouge.items()}
    )


def test_examples_are_known_by_what_they_are(applied: Applied, evaluation: MakeEvaluation, encoded: Dataset) -> None:
    """Two methods' scores of the same examples can be paired; with another reference, or order, they cannot."""
    knobs = Evaluate()
    same = [build_quality(knobs, encoded, list(encoded[column])) for column in ("summary", "article")]
    identities = [quality.per_example.examples_fingerprint for quality in same if quality.per_example]
    assert identities[0] == identities[1]
    other = encoded.select(range(6, -1, -1))
    turned = build_quality(knobs, other, list(other["summary"])).per_example
    assert turned is not None
    assert turned.examples_fingerprint != identities[0]
    summaries = [*encoded["summary"][:-1], "another"]
    changed = encoded.remove_columns("summary").add_column("summary", summaries)
    with_another = build_quality(knobs, changed, summaries).per_example
    assert with_another is not None
    assert with_another.examples_fingerprint != identities[0]


def test_only_what_is_asked_for(applied: Applied, evaluation: MakeEvaluation) -> None:
    """Without generation there is a loss and no ROUGE, and no figure of the study's under any name."""
    model = applied(ZeroShot(), "gpt2_tied")
    quality = evaluation(ZeroShot(), model, generate=False).evaluate(Probe(torch.device("cpu")))
    assert quality.loss is not None
    assert quality.rouge is None
    assert quality.teacher_forced_argmax_rouge is None
    assert quality.samples == ()


def test_precision_is_the_same_with_and_without_training(
    fresh_base: Fresh, encoder: Encoder, encoded: Dataset, workshop: Workshop
) -> None:
    """A base that was never prepared for training is evaluated in the recipe's precision, as a trained one is."""
    from accelerate import Accelerator

    losses = {}
    for prepared in (False, True):
        for precision in ("no", "bf16"):
            forget_accelerators()
            accelerator = Accelerator(cpu=True, mixed_precision=precision)
            model = fresh_base("gpt2_tied")
            built = built_around(model)  # before, as in a run: what a model may do without is found out in float32
            if prepared:
                accelerator.prepare(model)
            measured = Evaluator(alone(accelerator), built, encoder, encoded, workshop.recipe(ZeroShot()))
            losses[prepared, precision] = (measured.compute_held_out_loss().loss, measured.decode_teacher_forced())
    assert losses[False, "no"] == losses[True, "no"]
    assert losses[False, "bf16"] == losses[True, "bf16"]
    assert losses[True, "bf16"][0] != losses[True, "no"][0]
