"""Every method learns, and checkpointing changes nothing but memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from peftbench.training.loop import train_step
from tests.conformance.battery import Bench, Case, MakeBench, every_case
from tests.helpers.batches import micro_batch, one_batch
from tests.helpers.training import loss_for, trained, trainer_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from peftbench.modeling.loss import CausalLMLoss


@every_case
def test_fits_one_batch(case: Case, make_bench: MakeBench, accelerator: Accelerator) -> None:
    """Seen again and again, the loss of one batch falls by more than a third."""
    bench = make_bench(case)
    trainer = trainer_of(accelerator, bench.model, bench.optimizer)
    batch = one_batch(micro_batch(virtual=case.method.virtual_tokens))
    losses = [train_step(accelerator, trainer, batch, max_grad_norm=1.0) for _ in range(40)]
    assert losses[-1] < losses[0] * 2 / 3


def _loss_and_gradients(bench: Bench, computed: CausalLMLoss) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(7)  # for LoRA's dropout
    with computed.attention_context():
        loss = computed(bench.model, micro_batch(virtual=bench.case.method.virtual_tokens))
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in trained(bench.model).items()}
    return loss.item(), {name: gradient for name, gradient in gradients.items() if gradient is not None}


@every_case
def test_checkpointing_changes_no_number(case: Case, make_bench: MakeBench) -> None:
    """With activations recomputed, loss and gradients are the same as without, and something was recomputed."""
    plain, checkpointed = make_bench(case), make_bench(case)
    checkpointed.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    attention = next(m for name, m in checkpointed.base.named_modules() if name.endswith((".attn", ".self_attn")))
    losses = loss_for(plain.model), loss_for(checkpointed.model)  # which calls the model itself, to find out how
    calls: list[int] = []
    attention.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, gradients = _loss_and_gradients(plain, losses[0])
    loss_again, gradients_again = _loss_and_gradients(checkpointed, losses[1])
    assert loss_again == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == gradients_again.keys() == trained(plain.model).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-5, atol=1e-6)
    # A frozen trunk is in evaluation mode and has nothing to recompute.
    assert len(calls) == (1 if case.method.has_frozen_backbone else 2)
