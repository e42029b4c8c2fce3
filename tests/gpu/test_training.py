"""The training step on a GPU: packed rows give the loss of padded rows, and the host never synchronizes."""

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
from tests.helpers.gpu import forbid_gpu_sync
from tests.helpers.methods import every_method
from tests.helpers.training import base_model_of, trainable_parameters

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
Fresh = Callable[[str], "PreTrainedModel"]


def _compute_loss_and_gradients(
    model: nn.Module, loss: CausalLMLoss, batch: MicroBatch, dtype: torch.dtype | None, *, synchronizes: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradients of all trainable parameters; fail if the host synchronizes, unless allowed."""
    model.zero_grad()
    cuda_batch = batch.to(CUDA)
    torch.cuda.synchronize()
    with nullcontext() if synchronizes else forbid_gpu_sync(), loss.attention_context():
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            summed = loss(model, cuda_batch)
        summed.backward()  # type: ignore[no-untyped-call]
    return summed.item(), {
        name: p.grad.float().clone() for name, p in trainable_parameters(model).items() if p.grad is not None
    }


def _assert_near(
    actual: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]], tolerance: float
) -> None:
    assert actual[0] == pytest.approx(expected[0], rel=tolerance)
    assert actual[1].keys() == expected[1].keys()
    assert actual[1]
    for name, gradient in expected[1].items():
        assert (actual[1][name] - gradient).norm() <= 10 * tolerance * gradient.norm(), name


@every_method
@pytest.mark.parametrize("architecture", ["gpt2_tied", "llama_untied"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernel", ["torch", "liger"])
def test_packed_rows_match_padded_rows(  # noqa: PLR0917
    kernel: str,
    dtype: torch.dtype | None,
    architecture: str,
    method: Method,
    fresh_base: Fresh,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Loss and gradients of torch's variable-length attention match those of transformers' padding mask."""
    if kernel == "liger":
        pytest.importorskip("liger_kernel")
    torch.manual_seed(3)
    model = method.apply(fresh_base(architecture), tokenizer).to(CUDA)
    method.set_training(model)
    padded_loss, _ = build_loss(base_model_of(model), labeled_only=False, use_masks=True)
    model.zero_grad()
    batch = micro_batch(virtual=method.virtual_tokens)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        summed = padded_loss(model, batch.to(CUDA))
    summed.backward()  # type: ignore[no-untyped-call]
    expected = (
        summed.item(),
        {name: p.grad.float().clone() for name, p in trainable_parameters(model).items() if p.grad is not None},
    )
    loss, notes = build_loss(base_model_of(model), kernel=kernel)  # type: ignore[arg-type]
    assert not notes
    # Liger counts its targets on the host, which synchronizes.
    batch = packed(virtual=method.virtual_tokens)
    actual = _compute_loss_and_gradients(model, loss, batch, dtype, synchronizes=kernel == "liger")
    _assert_near(actual, expected, 1e-4 if dtype is None else 2e-2)


def test_document_does_not_attend_to_another(fresh_base: Fresh) -> None:
    """In torch's variable-length attention, changing one document leaves the logits of the others bit-identical."""
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
        before, after = (loss.logits(base, packed_batch.to(CUDA)) for packed_batch in (batch, other))
    first = batch.lengths[0] - 6
    assert not torch.equal(before[:first], after[:first])
    assert torch.equal(before[first:], after[first:])
