"""What only a GPU can show of the lean step: its kernels give the CPU's loss, and nothing in a step waits for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
import torch

from peftbench.data.collate import MicroBatch
from peftbench.methods.base import Method
from peftbench.modeling.loss import CausalLMLoss, build_loss
from tests.helpers.batches import micro_batch, packed
from tests.helpers.gpu import without_waiting
from tests.helpers.methods import every_method
from tests.helpers.training import base_of, trained

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
Fresh = Callable[[str], "PreTrainedModel"]


def _found(
    model: nn.Module, loss: CausalLMLoss, batch: MicroBatch, dtype: torch.dtype | None, *, waits: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, over all that is trained, of a batch that is on the GPU before the clock starts."""
    model.zero_grad()
    there = batch.to(CUDA)
    torch.cuda.synchronize()
    with nullcontext() if waits else without_waiting(), loss.attention_context():
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            found = loss(model, there)
        found.backward()  # type: ignore[no-untyped-call]
    return found.item(), {name: p.grad.float().clone() for name, p in trained(model).items() if p.grad is not None}


def _assert_near(
    found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]], off: float
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=off)
    assert found[1].keys() == expected[1].keys()
    assert found[1]
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 10 * off * gradient.norm(), name


@every_method
@pytest.mark.parametrize("architecture", ["gpt2_tied", "llama_untied"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", ["torch", "liger"])
def test_packed_rows_are_padded_ones(  # noqa: PLR0917
    kernel: str,
    dtype: torch.dtype | None,
    architecture: str,
    method: Method,
    fresh_base: Fresh,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Documents in torch's kernel for unlike lengths, against transformers' mask over padding."""
    if kernel == "liger":
        pytest.importorskip("liger_kernel")
    torch.manual_seed(3)
    model = method.apply(fresh_base(architecture), tokenizer).to(CUDA)
    method.set_training(model)
    plain, _ = build_loss(base_of(model), labelled_only=False, use_masks=True)
    model.zero_grad()
    batch = micro_batch(virtual=method.virtual_tokens)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        summed = plain(model, batch.to(CUDA))
    summed.backward()  # type: ignore[no-untyped-call]
    expected = (
        summed.item(),
        {name: p.grad.float().clone() for name, p in trained(model).items() if p.grad is not None},
    )
    loss, notes = build_loss(base_of(model), kernel=kernel)  # type: ignore[arg-type]
    assert not notes
    # Liger counts its targets on the host.
    found = _found(model, loss, packed(virtual=method.virtual_tokens), dtype, waits=kernel == "liger")
    _assert_near(found, expected, 1e-4 if dtype is None else 2e-2)


def test_a_document_does_not_look_into_another(fresh_base: Fresh) -> None:
    """In torch's kernel for unlike lengths too, to the last bit."""
    base = fresh_base("gpt2_tied").eval()
    base.to("cuda")  # type: ignore[arg-type]
    loss, _ = build_loss(base)
    batch = packed()
    assert batch.packed_sequences is not None
    changed = batch.input_ids.clone()
    changed[0, : int(batch.packed_sequences.cu_seqlens[1])] += 1
    other = MicroBatch(
        changed, batch.logit_indices, batch.targets, batch.lengths, packed_sequences=batch.packed_sequences
    )
    with torch.no_grad(), loss.attention_context(), torch.autocast("cuda", dtype=torch.bfloat16):
        before, after = (loss.logits(base, shown.to(CUDA)) for shown in (batch, other))
    first = batch.lengths[0] - 6
    assert not torch.equal(before[:first], after[:first])
    assert torch.equal(before[first:], after[first:])
