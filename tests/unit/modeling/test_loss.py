"""The loss is a sum over labelled tokens, and a global batch's gradient does not depend on how it was cut."""

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
from tests.helpers.batches import labelled, labels_of, logits, mask_of, micro_batch, rows
from tests.helpers.methods import every_architecture, every_method
from tests.helpers.training import summed_loss, trained, trainer_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNEQUAL = ((20, 19), (12, 1), (25, 24), (30, 2), (9, 8), (17, 3), (8, 7))
"""Seven rows with 1, 11, 1, 28, 1, 14 and 1 labelled tokens."""


Fresh = Callable[[str], "PreTrainedModel"]


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it was asked to step on."""

    def __init__(self, parameters: list[nn.Parameter], learning_rate: float = 0.0) -> None:
        super().__init__(parameters, lr=learning_rate)
        self.seen: list[torch.Tensor] = []
        self.trained = parameters
        self.register_step_pre_hook(self._keep)

    def _keep(self, *_: object) -> None:
        self.seen = [parameter.grad.clone() for parameter in self.trained if parameter.grad is not None]


def _applied(method: Method, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    torch.manual_seed(3)
    model = method.apply(base, tokenizer)
    method.set_training(model)
    return model


def _batches(micro_batch_size: int | None, method: Method) -> Batches:
    collator = Collator(pad_token_id=0, virtual_tokens=method.virtual_tokens)
    return Batches(Dataset.from_list(rows(UNEQUAL)), collator, len(UNEQUAL), micro_batch_size, seed=0)


@every_method
@every_architecture
def test_loss_is_what_transformers_says(
    architecture: str, method: Method, fresh_base: Fresh, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Divided by the labelled tokens, the loss of a batch is the one transformers gives for the same labels."""
    model, soft = _applied(method, fresh_base(architecture), tokenizer).eval(), method.virtual_tokens
    batch = micro_batch(virtual=soft)
    with torch.no_grad():
        mask = mask_of(batch)
        theirs = model(input_ids=batch.input_ids, attention_mask=mask, labels=labels_of(batch, soft)).loss
        assert (summed_loss(model, batch) / labelled(batch)).item() == pytest.approx(theirs.item(), rel=1e-6)


@every_architecture
def test_loss_by_hand(architecture: str, fresh_base: Fresh) -> None:
    """The loss of a batch is the sum, over rows alone and unpadded, of minus the log-probability of each target."""
    model = fresh_base(architecture).eval()
    batch = micro_batch()
    by_hand = 0.0
    for ids, length, labels in zip(batch.input_ids, batch.lengths, labels_of(batch), strict=True):
        with torch.no_grad():
            scores = model(input_ids=ids[None, :length]).logits[0].double().log_softmax(-1)
        by_hand -= sum(
            scores[position - 1, ids[position]].item() for position in range(1, length) if labels[position] != -100
        )
    with torch.no_grad():
        assert summed_loss(model, batch).item() == pytest.approx(by_hand, rel=1e-5)


def test_logits_are_those_of_real_positions(fresh_base: Fresh, tokenizer: PreTrainedTokenizerBase) -> None:
    """Logits of virtual tokens are cut off in front: what is left stands over the tokens that it predicts from."""
    model = _applied(PromptTuning(num_virtual_tokens=5), fresh_base("gpt2_tied"), tokenizer).eval()
    batch = micro_batch()
    with torch.no_grad():
        everything = model(input_ids=batch.input_ids, attention_mask=mask_of(batch)).logits
        cut = logits(model, batch)
    assert everything.shape[1] == batch.input_ids.shape[1] + 5
    assert torch.equal(cut, everything[:, 5:])


@every_method
@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_micro_batches_change_no_gradient(
    micro_batch_size: int,
    method: Method,
    fresh_base: Fresh,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
) -> None:
    """However a global batch is cut, its loss and gradient are those of the mean over all its labelled tokens."""
    found = {}
    for size in (None, micro_batch_size):
        model = _applied(method, fresh_base("gpt2_tied"), tokenizer)
        recorder = Recorder(list(trained(model).values()))
        batch = next(iter(_batches(size, method)))
        assert len(batch.micro_batches) == (1 if size is None else -(-len(UNEQUAL) // size))
        loss = train_step(accelerator, trainer_of(accelerator, model, recorder), batch, max_grad_norm=None)
        found[size] = (loss, recorder.seen)
    (loss, gradients), (loss_again, gradients_again) = found[None], found[micro_batch_size]
    assert loss_again == pytest.approx(loss, rel=1e-5)
    assert len(gradients) == len(gradients_again) > 0
    for whole, cut in zip(gradients, gradients_again, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5)


def test_mean_of_means_would_differ(
    fresh_base: Fresh, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> None:
    """On the same batch the mean of the micro-batches' means is another loss with another gradient.

    So the test above could not pass with it.
    """
    model = _applied(Full(), fresh_base("gpt2_tied"), tokenizer)
    recorder = Recorder(list(trained(model).values()))
    batch = next(iter(_batches(1, Full())))
    loss = train_step(accelerator, trainer_of(accelerator, model, recorder), batch, max_grad_norm=None)
    means = [summed_loss(model, part) / labelled(part) for part in batch.micro_batches]
    wrong = torch.stack(means).mean()
    wrong.backward()  # type: ignore[no-untyped-call]
    assert abs(wrong.item() - loss) > 1e-2 * loss
    theirs = torch.cat(
        [parameter.grad.flatten() for parameter in trained(model).values() if parameter.grad is not None]
    )
    ours = torch.cat([gradient.flatten() for gradient in recorder.seen])
    assert (theirs - ours).norm() > 0.1 * ours.norm()


def test_as_published_labels_everything(fresh_base: Fresh) -> None:
    """Labelled as the study did, padding enters the loss, and a step divides by all the positions that entered."""
    made = rows([(9, 6), (14, 5)])
    batch = Collator(pad_token_id=0, label_padding=True).collate(
        [row["input_ids"] for row in made], [row["prompt_tokens"] for row in made]
    )
    assert labelled(batch) == 2 * (14 - 1)
    model = fresh_base("gpt2_tied").eval()
    with torch.no_grad():
        theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.input_ids).loss
        ours = summed_loss(
            model, batch, use_masks=True
        )  # as a run does it: here padding asks, and may not be looked at
        assert ours.item() == pytest.approx(26 * theirs.item(), rel=1e-5)
