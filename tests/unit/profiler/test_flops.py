"""The closed form equals the count of dispatched FLOPs exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peftbench.data.collate import Collator, FlopUnits, PaddingFreeCollator
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.modeling.activation_checkpointing import enable_checkpointing
from peftbench.profiler.flop_counter import FlopCounter
from peftbench.profiler.flops import UnsupportedFlopsError, count_flops
from tests.conformance.battery import REFUSED, VARIANTS
from tests.helpers.methods import PRESETS
from tests.helpers.models import ARCHITECTURES
from tests.helpers.sweeps import mark_slow

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS, WIDTH = 3, 16
METHOD_VARIANTS = {
    name: method for variants in VARIANTS.values() for name, method in variants.items() if "dora" not in name
}

PAIRS = [(variant, name) for variant in METHOD_VARIANTS for name in ARCHITECTURES if (variant, name) not in REFUSED]
CASES = [
    (variant, architecture, checkpointing)
    for variant, architecture in PAIRS
    for checkpointing in (False, True)
    if not (checkpointing and METHOD_VARIANTS[variant].has_frozen_backbone)  # it has no effect there
]


def is_plain(point: tuple[Any, ...]) -> bool:
    """True for a method's first variant on the first architecture, with and without checkpointing; not for presets."""
    first = {next(iter(variants)) for kind, variants in VARIANTS.items() if kind not in PRESETS}
    return point[0] in first and point[1] == next(iter(ARCHITECTURES))


def full_rectangle(method: Method, rows: int = ROWS, width: int = WIDTH) -> FlopUnits:
    """Return the units of rows without padding whose positions are all labeled."""
    width += method.virtual_tokens
    return FlopUnits(rows * width, rows * width**2, rows * width * (width + 1) // 2, rows * width, width, rows, 1)


def count_dispatched_flops(model: nn.Module, device: str = "cpu") -> int:
    """Return the FLOPs dispatched in one forward and backward pass."""
    ids = torch.zeros((ROWS, WIDTH), dtype=torch.long, device=device)
    mask = None if device == "meta" else torch.ones_like(ids)
    with FlopCounter() as counter:
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum().backward()
    total: int | None = counter.total_flops
    assert total is not None
    return total


def with_dropout(base: PreTrainedModel, probability: float) -> PreTrainedModel:
    """Set every dropout of ``base`` to ``probability``, including attention's."""
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
    return base


def test_cases_cover_every_method() -> None:
    """Every method and architecture is in the sweep."""
    assert {method.kind for method in METHOD_VARIANTS.values()} == set(VARIANTS)
    assert {architecture for _, architecture in PAIRS} == set(ARCHITECTURES)
    assert {METHOD_VARIANTS[variant].kind for variant, _, checkpointing in CASES if checkpointing} == set(VARIANTS)
    assert any(METHOD_VARIANTS[variant].has_frozen_backbone for variant, _ in PAIRS)


@pytest.mark.parametrize(
    ("variant", "architecture", "checkpointing", "dropout"),
    mark_slow([(*case, dropout) for case in CASES for dropout in (0.0, 0.1)], is_plain, seed=1),
)
def test_closed_form_equals_dispatched_flops(  # noqa: PLR0917
    variant: str,
    architecture: str,
    checkpointing: bool,
    dropout: float,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Hardware FLOPs include recomputation and fused attention."""
    method = METHOD_VARIANTS[variant]
    base = with_dropout(fresh_base(architecture), dropout)
    model = method.apply(base, tokenizer).train()
    if checkpointing:
        enable_checkpointing(base)
    flop_cost = count_flops(
        model,
        base,
        virtual_tokens=method.virtual_tokens,
        gradient_checkpointing=checkpointing,
        computes_all_logits=True,
    )
    assert flop_cost.compute_hardware_flops(full_rectangle(method)) == count_dispatched_flops(model)


@pytest.mark.parametrize(("variant", "architecture", "checkpointing"), mark_slow(CASES, is_plain, seed=2))
def test_closed_form_equals_dispatched_flops_on_meta(  # noqa: PLR0917
    variant: str,
    architecture: str,
    checkpointing: bool,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same on the meta device, with eager attention."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_, **__: None)
    method = METHOD_VARIANTS[variant]
    base = with_dropout(fresh_base(architecture), 0.0)
    base.set_attn_implementation("eager")
    model = method.apply(base, tokenizer).train()
    if checkpointing:
        enable_checkpointing(base)
    flop_cost = count_flops(
        model,
        base,
        virtual_tokens=method.virtual_tokens,
        gradient_checkpointing=checkpointing,
        computes_all_logits=True,
    )
    assert flop_cost.compute_hardware_flops(full_rectangle(method)) == count_dispatched_flops(model.to("meta"), "meta")


@pytest.mark.parametrize(("variant", "architecture"), mark_slow(PAIRS, is_plain, seed=8))
def test_model_flops_do_not_depend_on_checkpointing(
    variant: str, architecture: str, fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Model FLOPs exclude recomputation, and the backward pass ends at the lowest trained parameter either way."""
    method = METHOD_VARIANTS[variant]
    base = fresh_base(architecture)
    model = method.apply(base, tokenizer)
    method.set_training(model)

    def count(*, checkpointing: bool) -> int:
        cost = count_flops(
            model,
            base,
            virtual_tokens=method.virtual_tokens,
            gradient_checkpointing=checkpointing,
            computes_all_logits=False,
        )
        return cost.compute_model_flops(full_rectangle(method))

    plain = count(checkpointing=False)
    enable_checkpointing(base)
    assert count(checkpointing=True) == plain


def test_gpt2_small_matches_textbook_formulas(tokenizer: PreTrainedTokenizerBase) -> None:
    """GPT-2 small with 6 x 1,024 tokens, for each method."""
    layers, width, vocabulary, rows, length = 12, 768, 50257, 6, 1024
    blocks = 24 * layers * width**2  # a position
    head = 2 * width * vocabulary
    by_hand = {}
    for virtual in (0, 20):
        tokens = rows * (length + virtual)
        attention = 4 * rows * (length + virtual) * (length + virtual + 1) // 2 * width * layers
        rank = 8
        low = 2 * tokens * layers * 4 * width * rank
        first = 2 * tokens * (3 * width**2 + width * rank)  # the first block's input needs no gradient
        by_hand[virtual] = {
            "full": 3 * blocks * tokens + 7 * attention // 2 + 3 * head * tokens,
            "last_layer": blocks * tokens + attention + 2 * head * tokens,
            "prompt_tuning": 2 * blocks * tokens + 7 * attention // 2 + 2 * head * tokens,
            "lora": 2 * blocks * tokens + 7 * attention // 2 + 2 * head * tokens + 3 * low - first,
        }
    assert {k: round(v / 1e12, 3) for k, v in by_hand[0].items() if k != "prompt_tuning"} == {
        "full": 4.96,
        "last_layer": 2.108,
        "lora": 3.431,
    }
    gpt2_small = GPT2LMHeadModel(GPT2Config(n_positions=length + 20, attn_pdrop=0.0))
    for method in (Full(), LastLayer(), PromptTuning(num_virtual_tokens=20), Lora(r=8, target_modules=None)):
        base = copy.deepcopy(gpt2_small)
        model = method.apply(base, tokenizer)
        flop_cost = count_flops(
            model, base, virtual_tokens=method.virtual_tokens, gradient_checkpointing=False, computes_all_logits=True
        )
        expected = by_hand[method.virtual_tokens][method.kind]
        assert flop_cost.compute_hardware_flops(full_rectangle(method, rows, length)) == expected


def test_model_flops_exclude_padding_and_recomputation(
    fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Padding, future pairs, head positions without a label and recomputation count only as hardware FLOPs."""
    base = fresh_base("gpt2_tied")
    model = Full().apply(base, tokenizer)
    plain = count_flops(model, base, virtual_tokens=0, gradient_checkpointing=False, computes_all_logits=False)
    recomputed = count_flops(model, base, virtual_tokens=0, gradient_checkpointing=True, computes_all_logits=False)
    collator = Collator(pad_token_id=0)
    unpadded = collator.collate([[1] * 9], [[6, 9]])
    with_padding = Collator(pad_token_id=0, pad_to_length=30).collate([[1] * 9], [[6, 9]])
    assert collator.model_flop_units(unpadded) == FlopUnits(
        positions=9, pairs=81, causal_pairs=45, labeled=3, columns=9
    )
    assert collator.model_flop_units(with_padding) == collator.model_flop_units(unpadded)
    assert collator.hardware_flop_units(with_padding) == FlopUnits(30, 900, 465, 3, 30, 1, 1)
    all_logits = count_flops(model, base, virtual_tokens=0, gradient_checkpointing=False, computes_all_logits=True)
    model_units, hardware_units = collator.model_flop_units(unpadded), collator.hardware_flop_units(with_padding)
    needed = plain.compute_model_flops(model_units)
    assert needed == recomputed.compute_model_flops(model_units) == all_logits.compute_model_flops(model_units)
    executed = plain.compute_hardware_flops(hardware_units)
    assert needed < plain.compute_hardware_flops(collator.hardware_flop_units(unpadded)) < executed
    assert executed < recomputed.compute_hardware_flops(hardware_units)
    # Forward and backward pass of the head at the 27 positions without a label.
    assert all_logits.compute_hardware_flops(hardware_units) - executed == 27 * 6 * 64 * 4096


def test_virtual_tokens_count_as_positions() -> None:
    """They also take part in attention, in model and hardware FLOPs."""
    collator = Collator(pad_token_id=0, virtual_tokens=5)
    batch = collator.collate([[1] * 9, [1] * 4], [[6, 9], [2, 4]])
    expected = FlopUnits(14 + 9, 14**2 + 9**2, 14 * 15 // 2 + 9 * 10 // 2, 3 + 2, 14 + 9)
    assert collator.model_flop_units(batch) == expected
    assert collator.hardware_flop_units(batch) == FlopUnits(28, 2 * 14**2, 2 * 14 * 15 // 2, 3 + 2, 14, 2, 1)
    packer = PaddingFreeCollator(pad_token_id=0, virtual_tokens=5)
    row = packer.collate([[1] * 9, [1] * 4], [[6, 9], [2, 4]])
    assert packer.model_flop_units(row) == expected
    assert packer.hardware_flop_units(row) == replace(expected, rows=1, passes=1)


def test_mask_disables_causal_skipping() -> None:
    """With a padding mask all pairs are computed; without padding there is no mask."""
    collator = Collator(pad_token_id=0, label_padding=True)
    batch, unpadded = (
        collator.collate([[1] * 9, [1] * 4], [[6, 9], [2, 4]]),
        collator.collate([[1] * 9, [1] * 9], [[6, 9], [2, 9]]),
    )
    assert collator.hardware_flop_units(batch) == FlopUnits(18, 2 * 81, 2 * 81, 2 * 8, 9, 2, 1)
    assert collator.hardware_flop_units(unpadded) == FlopUnits(18, 2 * 81, 2 * 45, 2 * 8, 9, 2, 1)


def test_counter_matches_known_products() -> None:
    """A matrix product counts two FLOPs per multiply-add."""
    with FlopCounter() as counter:
        torch.ones(3, 5) @ torch.ones(5, 7)
    assert counter.total_flops == 2 * 3 * 5 * 7
    left, right, output = torch.ones(3, 5), torch.ones(5, 7), torch.ones(3, 7)
    with FlopCounter() as counter:
        torch.addmm(output, left, right, beta=2)
        output.addmm_(left, right)
    assert counter.total_flops == 2 * 2 * 3 * 5 * 7


def test_dora_is_refused(fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> None:
    """DoRA multiplies weights with each other, and those FLOPs do not scale with positions."""
    base = fresh_base("gpt2_tied")
    model = Lora(r=4, use_dora=True).apply(base, tokenizer)
    with pytest.raises(UnsupportedFlopsError, match="does not scale with the positions"):
        count_flops(model, base, virtual_tokens=0, gradient_checkpointing=False, computes_all_logits=False)


@pytest.mark.parametrize(
    ("product", "message"),
    [
        (lambda hidden: torch.cdist(hidden, hidden), "unknown matrix product cdist"),
        (lambda hidden: torch.tensordot(hidden, hidden, 3), "does not scale with the positions"),
        (lambda hidden: torch.einsum("...i,...i->...", hidden, hidden), "does not scale with the positions"),
        (
            lambda hidden: torch.nn.functional.conv1d(hidden.mT, torch.ones(3, 64, 3), padding="same"),
            "unknown arguments of conv1d",
        ),
    ],
    ids=["cdist", "tensordot", "einsum", "conv1d"],
)
def test_unknown_products_are_refused(
    product: Callable[[torch.Tensor], torch.Tensor],
    message: str,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """A product without a formula raises an error and does not count as zero."""
    base = fresh_base("gpt2_tied")
    model = Full().apply(base, tokenizer)
    block = base.get_submodule("transformer.h.0")
    block.register_forward_hook(lambda _module, _inputs, hidden: hidden + product(hidden).mean())
    with pytest.raises(UnsupportedFlopsError, match=message):
        count_flops(model, base, virtual_tokens=0, gradient_checkpointing=False, computes_all_logits=False)


def test_failing_formula_does_not_end_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a formula rejects a kernel's arguments, the count is None and the step continues."""

    def failing_formula(*_: object, **__: object) -> int:
        raise KeyError("a new argument")

    left, right = torch.ones(2, 3), torch.ones(3, 4)
    monkeypatch.setattr("peftbench.profiler.flop_counter.flop_registry", {torch.ops.aten.mm: failing_formula})
    with FlopCounter() as counter:
        product = left @ right @ torch.ones(4, 4)
    assert counter.total_flops is None
    assert product.eq(12).all()
