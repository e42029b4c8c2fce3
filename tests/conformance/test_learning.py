"""Every method learns, and gradient checkpointing changes neither loss nor gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from peftbench.methods.selection import find_blocks
from peftbench.modeling.activation_checkpointing import enable_checkpointing
from peftbench.training.loop import train_step
from tests.conformance.battery import Bench, Case, MakeBench, every_case, every_variant
from tests.helpers.batches import micro_batch, one_batch
from tests.helpers.training import assemble_training, loss_for, trainable_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator

    from peftbench.modeling.loss import CausalLMLoss


@every_variant
def test_fits_one_batch(case: Case, make_bench: MakeBench, accelerator: Accelerator) -> None:
    """In 40 steps on one batch, the loss decreases by more than a third."""
    bench = make_bench(case)
    trainer = assemble_training(accelerator, bench.model, bench.optimizer)
    batch = one_batch(micro_batch(virtual=case.method.virtual_tokens))
    losses = [train_step(accelerator, trainer, batch, max_grad_norm=1.0) for _ in range(40)]
    assert losses[-1] < losses[0] * 2 / 3


def _compute_loss_and_gradients(bench: Bench, loss_fn: CausalLMLoss) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(7)  # the same dropout masks in LoRA
    with loss_fn.attention_context():
        loss = loss_fn(bench.model, micro_batch(virtual=bench.case.method.virtual_tokens))
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in trainable_parameters(bench.model).items()}
    return loss.item(), {name: gradient for name, gradient in gradients.items() if gradient is not None}


@every_case
def test_checkpointing_keeps_loss_and_gradients(case: Case, make_bench: MakeBench) -> None:
    """The first block runs twice if its output needs a gradient, so that its activations are recomputed."""
    plain, checkpointed = make_bench(case), make_bench(case)
    enable_checkpointing(checkpointed.base)
    block = find_blocks(checkpointed.base)[0][1]
    attention = next(m for name, m in block.named_modules() if name.endswith(("attn", "self_attn")))
    losses = loss_for(plain.model), loss_for(checkpointed.model)  # before the hook: building a loss runs the model
    needs_gradient: list[bool] = []
    block.register_forward_hook(lambda _module, _inputs, hidden: needs_gradient.append(hidden.requires_grad))
    calls: list[int] = []
    attention.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, gradients = _compute_loss_and_gradients(plain, losses[0])
    recomputed_loss, recomputed_gradients = _compute_loss_and_gradients(checkpointed, losses[1])
    assert recomputed_loss == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == recomputed_gradients.keys() == trainable_parameters(plain.model).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed_gradients[name], gradient, rtol=1e-5, atol=1e-6)
    assert len(calls) == (2 if needs_gradient[0] else 1)
    assert not (case.method.has_frozen_backbone and needs_gradient[0])
