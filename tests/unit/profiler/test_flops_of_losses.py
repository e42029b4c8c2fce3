"""FLOPs of the losses that are trained on: the closed form against torch's own count, and how little is wasted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peftbench.data.collate import Collator, FlopUnits, MicroBatch, PaddingFreeCollator
from peftbench.methods.base import Method
from peftbench.modeling import cross_entropy
from peftbench.modeling.loss import CausalLMLoss, LabelledLogitsLoss
from peftbench.profiler.flop_counter import FlopCounter
from peftbench.profiler.flops import FlopCost, count_flops
from tests.helpers.batches import LENGTHS_AND_PROMPTS, rows
from tests.helpers.methods import every_method
from tests.helpers.training import loss_for
from tests.unit.profiler.test_flops import CASES, EVERY, with_dropout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EVEN = ((20, 6), (20, 19), (20, 4))
"""Rows of one length, so that nothing is padded."""


def collated(collator: Collator, lengths_and_prompts: tuple[tuple[int, int], ...]) -> MicroBatch:
    """Random rows of these lengths in one micro-batch."""
    made = rows(lengths_and_prompts)
    return collator.collate([row["input_ids"] for row in made], [row["prompt_tokens"] for row in made])


def counted(model: nn.Module, loss: CausalLMLoss, batch: MicroBatch) -> int | None:
    """FLOPs that torch sees dispatched for a loss and its gradients."""
    with loss.attention_context(), FlopCounter() as seen:
        loss(model, batch).backward()  # type: ignore[no-untyped-call]
    total: int | None = seen.total_flops
    return total


def closed_form(model: nn.Module, base: PreTrainedModel, loss: CausalLMLoss, **knobs: Any) -> FlopCost:
    """As a run asks for it."""
    with loss.attention_context():
        return count_flops(model, base, computes_all_logits=loss.computes_all_logits, **knobs)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("variant", "architecture", "checkpointing"), CASES)
def test_the_closed_form_of_a_loss_is_what_is_counted(  # noqa: PLR0917
    variant: str,
    architecture: str,
    checkpointing: bool,
    dropout: float,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Padded and packed, whole and in chunks, over rows of unlike and of like lengths: to the last integer."""
    method = EVERY[variant]
    base = with_dropout(fresh_base(architecture), dropout)
    model = method.apply(base, tokenizer)
    method.set_training(model)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = loss_for(model)
    assert isinstance(loss, LabelledLogitsLoss)
    assert not loss.uses_masks
    found = closed_form(model, base, loss, virtual_tokens=method.virtual_tokens, gradient_checkpointing=checkpointing)
    virtual = method.virtual_tokens
    for collator in (
        Collator(0, virtual),
        Collator(0, virtual, pad_to_length=30),
        PaddingFreeCollator(0, virtual),
        PaddingFreeCollator(0, virtual, pad_to_multiple_of=64),
    ):
        for lengths in (LENGTHS_AND_PROMPTS, EVEN):
            batch = collated(collator, lengths)
            for chunk in (2**25, 3 * 4096):
                monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk)
                assert found.compute_hardware_flops(collator.hardware_flop_units(batch)) == counted(model, loss, batch)
            assert found.compute_model_flops(collator.model_flop_units(batch)) <= found.compute_hardware_flops(
                collator.hardware_flop_units(batch)
            )


@every_method
@pytest.mark.parametrize("architecture", ["gpt2_tied", "llama_untied"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_not_spared_is_counted(
    attention: str,
    architecture: str,
    method: Method,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The head everywhere, labels as published with a mask, and eager attention, which skips nothing."""
    base = with_dropout(fresh_base(architecture), 0.0)
    base.set_attn_implementation(attention)
    model = method.apply(base, tokenizer)
    method.set_training(model)
    virtual = method.virtual_tokens
    for knobs in ({"labelled": False}, {"masked": True}, {"labelled": False, "masked": True}):
        loss = loss_for(model, **knobs)
        found = closed_form(model, base, loss, virtual_tokens=virtual, gradient_checkpointing=False)
        for collator in (Collator(0, virtual), Collator(0, virtual, label_padding=True)):
            for lengths in (LENGTHS_AND_PROMPTS, EVEN):
                if collator.label_padding and not loss.uses_masks:
                    continue
                batch = collated(collator, lengths)
                assert found.compute_hardware_flops(collator.hardware_flop_units(batch)) == counted(model, loss, batch)


def news(count: int) -> list[tuple[int, int]]:
    """Lengths of examples and of their prompts as in CNN/DailyMail: about 840 tokens with 60 labels."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.normal(840.0, 200.0, (count,), generator=generator).clamp(200, 1000).int().tolist()
    labels = torch.normal(60.0, 20.0, (count,), generator=generator).clamp(10, 150).int().tolist()
    return [(length, length - summary) for length, summary in zip(lengths, labels, strict=True)]


@every_method
def test_little_is_executed_that_is_not_required(method: Method, tokenizer: PreTrainedTokenizerBase) -> None:
    """Of GPT-2 small over packed news within 3 %: attention's scores once more, and nothing else."""
    base = GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0))
    model = method.apply(base, tokenizer)
    method.set_training(model)
    loss = loss_for(model)
    found = closed_form(model, base, loss, virtual_tokens=method.virtual_tokens, gradient_checkpointing=False)
    packer = PaddingFreeCollator(0, method.virtual_tokens)
    needed, made = FlopUnits(), FlopUnits()
    for start in range(0, 48, 6):
        batch = collated(packer, tuple(news(48)[start : start + 6]))
        needed, made = needed + packer.model_flop_units(batch), made + packer.hardware_flop_units(batch)
    assert 800 < needed.positions / 48 - method.virtual_tokens < 880
    assert 50 < needed.labelled / 48 < 70
    assert needed == made
    again = 12 * 2 * 768 * needed.causal_pairs * (not method.has_frozen_backbone)
    assert found.compute_hardware_flops(made) - found.compute_model_flops(needed) == again
    assert found.compute_hardware_flops(made) / found.compute_model_flops(needed) < 1.03
