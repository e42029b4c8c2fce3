"""FLOPs of the training losses: the closed form equals the dispatched count, and little is recomputed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peftbench.data.collate import Collator, FlopUnits, MicroBatch, PaddingFreeCollator
from peftbench.methods.base import Method
from peftbench.modeling import cross_entropy
from peftbench.modeling.activation_checkpointing import enable_checkpointing
from peftbench.modeling.loss import CausalLMLoss, LabeledLogitsLoss
from peftbench.profiler.flop_counter import FlopCounter
from peftbench.profiler.flops import FlopCost, count_flops
from tests.helpers.batches import LENGTHS_AND_PROMPTS, rows
from tests.helpers.methods import ONE_OF_EACH, every_method
from tests.helpers.sweeps import mark_slow
from tests.helpers.training import loss_for
from tests.unit.profiler.test_flops import CASES, METHOD_VARIANTS, is_plain, with_dropout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EVEN = ((20, 6), (20, 19), (20, 4))
"""Rows of one length, without padding."""


def collate_rows(collator: Collator, lengths_and_prompts: tuple[tuple[int, int], ...]) -> MicroBatch:
    """Return random rows of these lengths in one micro-batch."""
    examples = rows(lengths_and_prompts)
    return collator.collate([row["input_ids"] for row in examples], [row["label_spans"] for row in examples])


def count_dispatched_flops(model: nn.Module, loss: CausalLMLoss, batch: MicroBatch) -> int | None:
    """Return the FLOPs dispatched for a loss and its gradients."""
    with loss.attention_context(), FlopCounter() as counter:
        loss(model, batch).backward()  # type: ignore[no-untyped-call]
    total: int | None = counter.total_flops
    return total


def compute_closed_form(model: nn.Module, base: PreTrainedModel, loss: CausalLMLoss, **options: Any) -> FlopCost:
    """Return the FLOP cost as in a run."""
    with loss.attention_context():
        return count_flops(model, base, computes_all_logits=loss.computes_all_logits, **options)


@pytest.mark.parametrize(
    ("variant", "architecture", "checkpointing", "dropout"),
    mark_slow(
        [(*case, dropout) for case in CASES for dropout in (0.0, 0.1)],
        lambda p: is_plain(p) and p[3] == 0,
        seed=3,
        one_in=40,
    ),
)
def test_closed_form_of_loss_equals_dispatched_flops(  # noqa: PLR0917
    variant: str,
    architecture: str,
    checkpointing: bool,
    dropout: float,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exactly, for padded and padding-free rows, whole and chunked logits, and different and equal row lengths."""
    method = METHOD_VARIANTS[variant]
    base = with_dropout(fresh_base(architecture), dropout)
    model = method.apply(base, tokenizer)
    method.set_training(model)
    if checkpointing:
        enable_checkpointing(base)
    loss = loss_for(model)
    assert isinstance(loss, LabeledLogitsLoss)
    assert not loss.uses_masks
    flop_cost = compute_closed_form(
        model, base, loss, virtual_tokens=method.virtual_tokens, gradient_checkpointing=checkpointing
    )
    virtual = method.virtual_tokens
    for collator in (
        Collator(0, virtual),
        Collator(0, virtual, pad_to_length=30),
        PaddingFreeCollator(0, virtual),
        PaddingFreeCollator(0, virtual, pad_to_multiple_of=64),
    ):
        for lengths in (LENGTHS_AND_PROMPTS, EVEN):
            batch = collate_rows(collator, lengths)
            for chunk in (2**25, 3 * 4096):
                monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk)
                assert flop_cost.compute_hardware_flops(collator.hardware_flop_units(batch)) == count_dispatched_flops(
                    model, loss, batch
                )
            assert flop_cost.compute_model_flops(collator.model_flop_units(batch)) <= flop_cost.compute_hardware_flops(
                collator.hardware_flop_units(batch)
            )


@pytest.mark.parametrize(
    ("attention", "architecture", "method"),
    mark_slow(
        [(a, b, m) for a in ("sdpa", "eager") for b in ("gpt2_tied", "llama_untied") for m in ONE_OF_EACH.values()],
        lambda point: point[1] == "llama_untied" and (point[0] == "eager") == (point[2].kind in {"full", "last_layer"}),
        seed=4,
    ),
)
def test_all_logits_masks_and_eager_attention_are_counted(
    attention: str,
    architecture: str,
    method: Method,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The head at all positions, labeled padding with a mask, and eager attention, which computes all pairs."""
    base = with_dropout(fresh_base(architecture), 0.0)
    base.set_attn_implementation(attention)
    model = method.apply(base, tokenizer)
    method.set_training(model)
    virtual = method.virtual_tokens
    for options in (
        {"labeled_only": False},
        {"use_masks": True},
        {"labeled_only": False, "use_masks": True},
    ):
        loss = loss_for(model, **options)
        flop_cost = compute_closed_form(model, base, loss, virtual_tokens=virtual, gradient_checkpointing=False)
        for collator in (Collator(0, virtual), Collator(0, virtual, label_padding=True)):
            for lengths in (LENGTHS_AND_PROMPTS, EVEN):
                if collator.label_padding and not loss.uses_masks:
                    continue
                batch = collate_rows(collator, lengths)
                assert flop_cost.compute_hardware_flops(collator.hardware_flop_units(batch)) == count_dispatched_flops(
                    model, loss, batch
                )


def draw_news_lengths(count: int) -> list[tuple[int, int]]:
    """Return lengths of examples and their prompts as in CNN/DailyMail: about 840 tokens with 60 labels."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.normal(840.0, 200.0, (count,), generator=generator).clamp(200, 1000).int().tolist()
    labels = torch.normal(60.0, 20.0, (count,), generator=generator).clamp(10, 150).int().tolist()
    return [(length, length - summary) for length, summary in zip(lengths, labels, strict=True)]


@pytest.fixture(scope="module")
def gpt2_small() -> GPT2LMHeadModel:
    """Return a GPT-2 small with random weights, which take a second to initialize. Tests copy it."""
    return GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0))


@every_method
def test_hardware_flops_are_within_3_percent_of_model_flops(
    method: Method, gpt2_small: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """GPT-2 small over padding-free news articles: only attention's scores are recomputed."""
    base = copy.deepcopy(gpt2_small)
    model = method.apply(base, tokenizer)
    method.set_training(model)
    loss = loss_for(model)
    flop_cost = compute_closed_form(
        model, base, loss, virtual_tokens=method.virtual_tokens, gradient_checkpointing=False
    )
    packer = PaddingFreeCollator(0, method.virtual_tokens)
    model_units, hardware_units = FlopUnits(), FlopUnits()
    for start in range(0, 48, 6):
        batch = collate_rows(packer, tuple(draw_news_lengths(48)[start : start + 6]))
        model_units = model_units + packer.model_flop_units(batch)
        hardware_units = hardware_units + packer.hardware_flop_units(batch)
    assert 800 < model_units.positions / 48 - method.virtual_tokens < 880
    assert 50 < model_units.labeled / 48 < 70
    assert model_units == replace(hardware_units, rows=0, passes=0)
    frozen_blocks = {"last_layer": 12, "select": 1}.get(method.kind, 0)  # select trains the second block
    recomputed = (12 - frozen_blocks) * 2 * 768 * model_units.causal_pairs
    assert flop_cost.compute_hardware_flops(hardware_units) - flop_cost.compute_model_flops(model_units) == recomputed
    assert flop_cost.compute_hardware_flops(hardware_units) / flop_cost.compute_model_flops(model_units) < 1.03
