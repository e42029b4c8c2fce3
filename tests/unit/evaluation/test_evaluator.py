"""Evaluator: held-out loss, teacher-forced argmax, and the quality in the record."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset

from peftbench.data.encode import Encoder
from peftbench.evaluation.evaluator import Evaluator
from peftbench.evaluation.outputs import Predictions, build_outputs
from peftbench.evaluation.scoring import build_quality
from peftbench.methods.base import Method
from peftbench.methods.baselines import ZeroShot
from peftbench.methods.full import Full
from peftbench.training.loop import train_step
from tests.helpers.batches import one_batch
from tests.helpers.evaluators import NEW_TOKENS, ApplyMethod, BuildEvaluator, evaluate_all
from tests.helpers.methods import every_architecture, every_method
from tests.helpers.training import (
    assemble_training,
    reset_accelerators,
    single_process_context,
    trainable_parameters,
    wrap_model,
)
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

Fresh = Callable[[str], "PreTrainedModel"]


@every_method
@every_architecture
def test_held_out_loss_matches_hand_computed_value(
    architecture: str,
    method: Method,
    apply_method: ApplyMethod,
    build_evaluator: BuildEvaluator,
    encoded: Dataset,
) -> None:
    """The held-out loss is the mean negative log-probability of all summary and end tokens.

    It is independent of the batch size, and differs from the mean over examples.
    """
    model = apply_method(method, architecture).eval()
    sums, counts = [], []
    for row in encoded:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, -ids.shape[1] :].double().log_softmax(-1)
        targets = range(*row["label_spans"])
        sums.append(-sum(log_probs[position - 1, ids[0, position]].item() for position in targets))
        counts.append(len(targets))
    expected = sum(sums) / sum(counts)
    for batch in (1, 3, 16):
        held_out = build_evaluator(method, model, batch_size=batch).compute_held_out_loss()
        assert held_out.loss == pytest.approx(expected, rel=1e-5)
        assert held_out.nll_sums == pytest.approx(sums, rel=1e-4)
        assert held_out.label_counts == tuple(counts)
    mean_of_means = sum(total / count for total, count in zip(sums, counts, strict=True)) / len(counts)
    assert mean_of_means != pytest.approx(expected, rel=1e-4)


def test_first_token_without_a_prompt_is_not_in_the_loss(
    apply_method: ApplyMethod, build_evaluator: BuildEvaluator, encoded: Dataset
) -> None:
    """Nothing predicts the first token of a row; the losses of the other examples do not change."""
    bare = encoded.map(
        lambda row, index: {"label_spans": [0 if index == 2 else row["label_spans"][0], row["label_spans"][1]]},
        with_indices=True,
    )
    model = apply_method(ZeroShot(), "gpt2_tied")
    evaluator = build_evaluator(ZeroShot(), model, bare, batch_size=3)
    held_out, original = (
        evaluator.compute_held_out_loss(),
        build_evaluator(ZeroShot(), model, batch_size=3).compute_held_out_loss(),
    )
    assert held_out.label_counts[2] == len(encoded[2]["input_ids"]) - 1
    others = [index for index in range(len(encoded)) if index != 2]
    assert [held_out.label_counts[index] for index in others] == [original.label_counts[index] for index in others]
    assert [held_out.nll_sums[index] for index in others] == pytest.approx(
        [original.nll_sums[index] for index in others]
    )
    assert len(evaluator.decode_teacher_forced()) == len(encoded)


def test_memorized_summaries_are_decoded(
    fresh_base: Fresh,
    accelerator: Accelerator,
    encoder: Encoder,
    encoded: Dataset,
    build_evaluator: BuildEvaluator,
) -> None:
    """After overfitting, teacher-forced argmax decodes each summary, in the split's order.

    This fails if logits are not shifted by one position: the logits before a token predict it.
    """
    model = fresh_base("gpt2_tied")
    evaluator = build_evaluator(Full(), model, batch_size=4, max_new_tokens=20)
    summaries = list(encoded["summary"])
    assert evaluator.decode_teacher_forced() != summaries
    batch = evaluator.collator.collate(encoded["input_ids"], encoded["label_spans"])
    trainer = assemble_training(accelerator, model, torch.optim.AdamW(trainable_parameters(model).values(), lr=3e-3))
    model.train()
    for _ in range(60):
        loss = train_step(accelerator, trainer, one_batch(batch), max_grad_norm=1.0)
    assert loss < 0.1
    assert evaluator.decode_teacher_forced() == summaries
    # Generation gives the same summaries if the prompt does not truncate the article more than training did.
    same_prompt = [encoder.encode_prompt(row) == row["input_ids"][: row["label_spans"][0]] for row in encoded]
    pairs = [
        pair for pair, same in zip(zip(evaluator.generate(), summaries, strict=True), same_prompt, strict=True) if same
    ]
    assert len(pairs) >= 3
    assert [generated for generated, _ in pairs] == [summary for _, summary in pairs]


def test_quality_has_all_metrics_and_samples(
    apply_method: ApplyMethod, build_evaluator: BuildEvaluator, encoded: Dataset, workshop: Workshop
) -> None:
    """It has the number of examples, the metrics, and the requested number of samples with their references."""
    model = apply_method(ZeroShot(), "gpt2_tied")
    keys: dict[str, Any] = {
        "metrics": ("rouge", "exact_match", "perplexity"),
        "saved_samples": 3,
        "teacher_forced": True,
    }
    evaluator = build_evaluator(ZeroShot(), model, **keys)
    recipe = workshop.recipe(ZeroShot(), evaluate=keys | {"max_new_tokens": NEW_TOKENS})
    quality = evaluate_all(evaluator, recipe)
    assert (quality.split, quality.num_examples) == ("test", 7)
    assert quality.loss == evaluator.compute_held_out_loss().loss
    assert quality.loss is not None
    assert quality.perplexity == pytest.approx(math.exp(quality.loss))
    of_text = ["rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match"]
    assert list(quality.metrics) == [*of_text, "perplexity"]
    assert list(quality.teacher_forced_metrics) == of_text
    assert quality.headline_metric == "rougeL"
    assert quality.metrics["perplexity"].interval.mean == pytest.approx(quality.perplexity)
    assert [sample.prompt for sample in quality.samples] == list(encoded["article"])[:3]
    assert [sample.id for sample in quality.samples] == list(encoded["id"])[:3]
    assert [sample.reference for sample in quality.samples] == list(encoded["summary"])[:3]
    assert [sample.generated for sample in quality.samples] == evaluator.generate()[:3]
    per_example = quality.per_example
    assert per_example is not None
    assert len(per_example.loss) == len(per_example.labeled_tokens) == 7
    assert sum(per_example.loss) / sum(per_example.labeled_tokens) == pytest.approx(quality.loss)
    assert {name: sum(values) / 7 for name, values in per_example.metrics.items()} == pytest.approx(
        {name: score.interval.mean for name, score in quality.metrics.items()}
    )


def test_examples_fingerprint_depends_on_examples_and_order(encoded: Dataset, workshop: Workshop) -> None:
    """Scores can be paired only if the examples, their references and their order are equal."""
    recipe = workshop.recipe(ZeroShot())

    def fingerprint(dataset: Dataset, texts: list[str]) -> str:
        outputs = build_outputs(dataset, recipe.task, Predictions(generated=texts))
        per_example = build_quality(recipe, dataset, outputs).per_example
        assert per_example is not None
        return per_example.examples_fingerprint

    same = [fingerprint(encoded, list(encoded[column])) for column in ("summary", "article")]
    assert same[0] == same[1]
    reversed_split = encoded.select(range(6, -1, -1))
    assert fingerprint(reversed_split, list(reversed_split["summary"])) != same[0]
    summaries = [*encoded["summary"][:-1], "another"]
    changed = encoded.remove_columns("summary").add_column("summary", summaries)
    assert fingerprint(changed, summaries) != same[0]


def test_scores_are_absent_without_metrics(
    apply_method: ApplyMethod, build_evaluator: BuildEvaluator, workshop: Workshop
) -> None:
    """The loss is computed; scores, teacher-forced scores and samples are absent."""
    model = apply_method(ZeroShot(), "gpt2_tied")
    quality = evaluate_all(build_evaluator(ZeroShot(), model, metrics=()), workshop.recipe(ZeroShot()))
    assert quality.loss is not None
    assert quality.metrics == {}
    assert quality.headline_metric is None
    assert quality.teacher_forced_metrics == {}
    assert quality.samples == ()


def test_untrained_model_is_evaluated_in_the_recipe_s_precision(
    fresh_base: Fresh, encoder: Encoder, encoded: Dataset, workshop: Workshop
) -> None:
    """A model gives the same results with and without being prepared by accelerate."""
    from accelerate import Accelerator

    losses = {}
    for prepared in (False, True):
        for precision in ("no", "bf16"):
            reset_accelerators()
            accelerator = Accelerator(cpu=True, mixed_precision=precision)
            model = fresh_base("gpt2_tied")
            built = wrap_model(model)  # before prepare, as in a run: the loss inspects the model in float32
            if prepared:
                accelerator.prepare(model)
            evaluator = Evaluator(
                single_process_context(accelerator), built, encoder, encoded, workshop.recipe(ZeroShot())
            )
            losses[prepared, precision] = (evaluator.compute_held_out_loss().loss, evaluator.decode_teacher_forced())
    assert losses[False, "no"] == losses[True, "no"]
    assert losses[False, "bf16"] == losses[True, "bf16"]
    assert losses[True, "bf16"][0] != losses[True, "no"][0]
