"""The loss is a sum over labeled tokens, and the gradient of a global batch does not depend on its micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from datasets import Dataset
from torch import nn

from peftbench.data.batches import Batches
from peftbench.data.collate import Collator
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.training.loop import train_step
from tests.helpers.batches import count_labeled_tokens, labels_of, logits, mask_of, micro_batch, rows
from tests.helpers.methods import every_architecture, every_method
from tests.helpers.training import assemble_training, summed_loss, trainable_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNEQUAL = ((20, 19), (12, 1), (25, 24), (30, 2), (9, 8), (17, 3), (8, 7))
"""Seven rows with 1, 11, 1, 28, 1, 14 and 1 labeled tokens."""


BaseFactory = Callable[[str], "PreTrainedModel"]


class Recorder(torch.optim.SGD):
    """SGD that stores the gradients of its last step."""

    def __init__(self, parameters: list[nn.Parameter], learning_rate: float = 0.0) -> None:
        super().__init__(parameters, lr=learning_rate)
        self.gradients: list[torch.Tensor] = []
        self.trained_parameters = parameters
        self.register_step_pre_hook(self._store_gradients)

    def _store_gradients(self, *_: object) -> None:
        self.gradients = [parameter.grad.clone() for parameter in self.trained_parameters if parameter.grad is not None]


def _apply_method(method: Method, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    torch.manual_seed(3)
    model = method.apply(base, tokenizer)
    method.set_training(model)
    return model


def _build_batches(micro_batch_size: int | None, method: Method) -> Batches:
    collator = Collator(pad_token_id=0, virtual_tokens=method.virtual_tokens)
    return Batches(Dataset.from_list(rows(UNEQUAL)), collator, len(UNEQUAL), micro_batch_size, seed=0)


@every_method
@every_architecture
def test_mean_loss_matches_transformers(
    architecture: str, method: Method, fresh_base: BaseFactory, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The loss divided by the number of labeled tokens equals the loss of transformers for the same labels."""
    model = _apply_method(method, fresh_base(architecture), tokenizer).eval()
    batch = micro_batch(virtual=method.virtual_tokens)
    with torch.no_grad():
        labels = labels_of(batch, method.virtual_tokens)
        expected = model(input_ids=batch.input_ids, attention_mask=mask_of(batch), labels=labels).loss
        assert (summed_loss(model, batch) / count_labeled_tokens(batch)).item() == pytest.approx(
            expected.item(), rel=1e-6
        )


@every_architecture
def test_loss_matches_sum_over_targets_by_hand(architecture: str, fresh_base: BaseFactory) -> None:
    """The loss of a batch is the sum of minus the log-probability of each target, from one unpadded row at a time."""
    model = fresh_base(architecture).eval()
    batch = micro_batch()
    by_hand = 0.0
    for ids, length, labels in zip(batch.input_ids, batch.lengths, labels_of(batch), strict=True):
        with torch.no_grad():
            log_probabilities = model(input_ids=ids[None, :length]).logits[0].double().log_softmax(-1)
        by_hand -= sum(
            log_probabilities[position - 1, ids[position]].item()
            for position in range(1, length)
            if labels[position] != -100
        )
    with torch.no_grad():
        assert summed_loss(model, batch).item() == pytest.approx(by_hand, rel=1e-5)


def test_logits_exclude_virtual_tokens(fresh_base: BaseFactory, tokenizer: PreTrainedTokenizerBase) -> None:
    """The first logits, those of virtual tokens, are cut off; the others are at the positions of the real tokens."""
    model = _apply_method(PromptTuning(num_virtual_tokens=5), fresh_base("gpt2_tied"), tokenizer).eval()
    batch = micro_batch()
    with torch.no_grad():
        all_logits = model(input_ids=batch.input_ids, attention_mask=mask_of(batch)).logits
        real_logits = logits(model, batch)
    assert all_logits.shape[1] == batch.input_ids.shape[1] + 5
    assert torch.equal(real_logits, all_logits[:, 5:])


@every_method
@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_gradient_does_not_depend_on_micro_batch_size(
    micro_batch_size: int,
    method: Method,
    fresh_base: BaseFactory,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
) -> None:
    """Loss and gradient are those of the mean over all labeled tokens of the global batch."""
    results = {}
    for size in (None, micro_batch_size):
        model = _apply_method(method, fresh_base("gpt2_tied"), tokenizer)
        recorder = Recorder(list(trainable_parameters(model).values()))
        batch = next(iter(_build_batches(size, method)))
        assert len(batch.micro_batches) == (1 if size is None else -(-len(UNEQUAL) // size))
        loss = train_step(accelerator, assemble_training(accelerator, model, recorder), batch, max_grad_norm=None)
        results[size] = (loss, recorder.gradients)
    (loss, gradients), (accumulated_loss, accumulated_gradients) = results[None], results[micro_batch_size]
    assert accumulated_loss == pytest.approx(loss, rel=1e-5)
    assert len(gradients) == len(accumulated_gradients) > 0
    for gradient, accumulated in zip(gradients, accumulated_gradients, strict=True):
        torch.testing.assert_close(accumulated, gradient, rtol=1e-4, atol=1e-5)


def test_mean_of_micro_batch_means_differs(
    fresh_base: BaseFactory, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> None:
    """The mean of the micro-batches' means has another loss and gradient, so the test above would fail with it."""
    model = _apply_method(Full(), fresh_base("gpt2_tied"), tokenizer)
    recorder = Recorder(list(trainable_parameters(model).values()))
    batch = next(iter(_build_batches(1, Full())))
    loss = train_step(accelerator, assemble_training(accelerator, model, recorder), batch, max_grad_norm=None)
    means = [summed_loss(model, part) / count_labeled_tokens(part) for part in batch.micro_batches]
    wrong = torch.stack(means).mean()
    wrong.backward()  # type: ignore[no-untyped-call]
    assert abs(wrong.item() - loss) > 1e-2 * loss
    wrong_gradient = torch.cat(
        [parameter.grad.flatten() for parameter in trainable_parameters(model).values() if parameter.grad is not None]
    )
    gradient = torch.cat([gradient.flatten() for gradient in recorder.gradients])
    assert (wrong_gradient - gradient).norm() > 0.1 * gradient.norm()


def test_label_padding_labels_every_position(fresh_base: BaseFactory) -> None:
    """With label_padding, as in the published study, padding has labels too and counts as labeled tokens."""
    examples = rows([(9, 6), (14, 5)])
    batch = Collator(pad_token_id=0, label_padding=True).collate(
        [row["input_ids"] for row in examples], [row["label_spans"] for row in examples]
    )
    assert count_labeled_tokens(batch) == 2 * (14 - 1)
    model = fresh_base("gpt2_tied").eval()
    with torch.no_grad():
        mean_loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.input_ids).loss
        # As in a run: padding is labeled, so other positions need a mask that hides it.
        loss = summed_loss(model, batch, use_masks=True)
        assert loss.item() == pytest.approx(26 * mean_loss.item(), rel=1e-5)
