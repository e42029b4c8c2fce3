"""FLOPs: the closed form against torch's own count of what is dispatched, to the last integer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

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
from peftbench.profiler.flop_counter import FlopCounter
from peftbench.profiler.flops import UnsupportedFlopsError, count_flops
from tests.conformance.battery import REFUSED, VARIANTS
from tests.helpers.models import ARCHITECTURES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS, WIDTH = 3, 16
EVERY = {name: method for variants in VARIANTS.values() for name, method in variants.items() if "dora" not in name}

PAIRS = [(variant, name) for variant in EVERY for name in ARCHITECTURES if (variant, name) not in REFUSED]
CASES = [
    (variant, architecture, checkpointing)
    for variant, architecture in PAIRS
    for checkpointing in (False, True)
    if not (checkpointing and EVERY[variant].has_frozen_backbone)  # it is left out there
]


def full_rectangle(method: Method, rows: int = ROWS, width: int = WIDTH) -> FlopUnits:
    """All positions, each labelled, as where the head computes everything."""
    width += method.virtual_tokens
    return FlopUnits(rows * width, rows * width**2, rows * width * (width + 1) // 2, rows * width, width)


def counted(model: nn.Module, device: str = "cpu") -> int:
    """FLOPs that torch sees dispatched in one forward and backward pass."""
    ids = torch.zeros((ROWS, WIDTH), dtype=torch.long, device=device)
    mask = None if device == "meta" else torch.ones_like(ids)
    with FlopCounter() as seen:
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum().backward()
    total: int | None = seen.total_flops
    assert total is not None
    return total


def with_dropout(base: PreTrainedModel, probability: float) -> PreTrainedModel:
    """Every dropout of ``base`` at ``probability``, that of attention included."""
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
    return base


def test_there_is_something_to_count() -> None:
    """Every variant of every method is in the list."""
    assert {method.kind for method in EVERY.values()} == set(VARIANTS)
    assert {architecture for _, architecture in PAIRS} == set(ARCHITECTURES)
    assert {EVERY[variant].kind for variant, _, checkpointing in CASES if checkpointing} == set(VARIANTS)
    assert any(EVERY[variant].has_frozen_backbone for variant, _ in PAIRS)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("variant", "architecture", "checkpointing"), CASES)
def test_the_closed_form_is_what_is_counted(  # noqa: PLR0917
    variant: str,
    architecture: str,
    checkpointing: bool,
    dropout: float,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Executed FLOPs in closed form are those dispatched on CPU, recomputation and fused attention included."""
    method = EVERY[variant]
    base = with_dropout(fresh_base(architecture), dropout)
    model = method.apply(base, tokenizer).train()
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = count_flops(
        model,
        base,
        virtual_tokens=method.virtual_tokens,
        gradient_checkpointing=checkpointing,
        computes_all_logits=True,
    )
    assert found.compute_hardware_flops(full_rectangle(method)) == counted(model)


@pytest.mark.parametrize(("variant", "architecture", "checkpointing"), CASES)
def test_the_closed_form_is_what_is_counted_on_meta(  # noqa: PLR0917
    variant: str,
    architecture: str,
    checkpointing: bool,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same without any arithmetic, with attention in separate products, as the meta device computes it."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_, **__: None)
    method = EVERY[variant]
    base = with_dropout(fresh_base(architecture), 0.0)
    base.set_attn_implementation("eager")
    model = method.apply(base, tokenizer).train()
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = count_flops(
        model,
        base,
        virtual_tokens=method.virtual_tokens,
        gradient_checkpointing=checkpointing,
        computes_all_logits=True,
    )
    assert found.compute_hardware_flops(full_rectangle(method)) == counted(model.to("meta"), "meta")


def test_gpt2_small_by_hand(tokenizer: PreTrainedTokenizerBase) -> None:
    """GPT-2 small, 6 x 1,024, each method, against the formulas one writes on paper."""
    layers, width, vocabulary, rows, length = 12, 768, 50257, 6, 1024
    blocks = 24 * layers * width**2  # a position
    head = 2 * width * vocabulary
    by_hand = {}
    for virtual in (0, 20):
        tokens = rows * (length + virtual)
        attention = 4 * rows * (length + virtual) * (length + virtual + 1) // 2 * width * layers
        rank = 8
        low = 2 * tokens * layers * 4 * width * rank
        first = 2 * tokens * (3 * width**2 + width * rank)  # no gradient of the first block's input
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
    for method in (Full(), LastLayer(), PromptTuning(num_virtual_tokens=20), Lora(r=8)):
        base = GPT2LMHeadModel(GPT2Config(n_positions=length + 20, attn_pdrop=0.0))
        model = method.apply(base, tokenizer)
        found = count_flops(
            model, base, virtual_tokens=method.virtual_tokens, gradient_checkpointing=False, computes_all_logits=True
        )
        expected = by_hand[method.virtual_tokens][method.kind]
        assert found.compute_hardware_flops(full_rectangle(method, rows, length)) == expected


def test_required_leaves_out_what_need_not_be(
    fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Padding, pairs that look ahead, unlabelled head positions and recomputation are executed and not required."""
    base = fresh_base("gpt2_tied")
    model = Full().apply(base, tokenizer)
    plain = count_flops(model, base, virtual_tokens=0, gradient_checkpointing=False, computes_all_logits=False)
    again = count_flops(model, base, virtual_tokens=0, gradient_checkpointing=True, computes_all_logits=False)
    collator = Collator(pad_token_id=0)
    alone = collator.collate([[1] * 9], [6])
    with_padding = Collator(pad_token_id=0, pad_to_length=30).collate([[1] * 9], [6])
    assert collator.model_flop_units(alone) == FlopUnits(positions=9, pairs=81, causal_pairs=45, labelled=3, columns=9)
    assert collator.model_flop_units(with_padding) == collator.model_flop_units(alone)
    assert collator.hardware_flop_units(with_padding) == FlopUnits(30, 900, 465, 3, 30)
    everywhere = count_flops(model, base, virtual_tokens=0, gradient_checkpointing=False, computes_all_logits=True)
    needed, made = collator.model_flop_units(alone), collator.hardware_flop_units(with_padding)
    assert (
        plain.compute_model_flops(needed) == again.compute_model_flops(needed) == everywhere.compute_model_flops(needed)
    )
    assert (
        plain.compute_model_flops(needed)
        < plain.compute_hardware_flops(collator.hardware_flop_units(alone))
        < plain.compute_hardware_flops(made)
    )
    assert plain.compute_hardware_flops(made) < again.compute_hardware_flops(made)
    # The head, forward and backward, at the 27 positions that predict no label.
    assert everywhere.compute_hardware_flops(made) - plain.compute_hardware_flops(made) == 27 * 6 * 64 * 4096


def test_virtual_tokens_are_work() -> None:
    """Soft tokens are positions that attend and are attended to, required and executed."""
    collator = Collator(pad_token_id=0, virtual_tokens=5)
    batch = collator.collate([[1] * 9, [1] * 4], [6, 2])
    needed = FlopUnits(14 + 9, 14**2 + 9**2, 14 * 15 // 2 + 9 * 10 // 2, 3 + 2, 14 + 9)
    assert collator.model_flop_units(batch) == needed
    assert collator.hardware_flop_units(batch) == FlopUnits(28, 2 * 14**2, 2 * 14 * 15 // 2, 3 + 2, 14)
    packer = PaddingFreeCollator(pad_token_id=0, virtual_tokens=5)
    row = packer.collate([[1] * 9, [1] * 4], [6, 2])
    assert packer.model_flop_units(row) == packer.hardware_flop_units(row) == needed


def test_a_mask_is_what_keeps_a_kernel_from_skipping() -> None:
    """Where padding may not be looked at all pairs are computed; without any padding no mask is left."""
    collator = Collator(pad_token_id=0, label_padding=True)
    batch, whole = collator.collate([[1] * 9, [1] * 4], [6, 2]), collator.collate([[1] * 9, [1] * 9], [6, 2])
    assert collator.hardware_flop_units(batch) == FlopUnits(18, 2 * 81, 2 * 81, 2 * 8, 9)
    assert collator.hardware_flop_units(whole) == FlopUnits(18, 2 * 81, 2 * 45, 2 * 8, 9)


def test_a_product_of_known_size() -> None:
    """The counter sees the two FLOPs of every multiplication and addition of a matrix product."""
    with FlopCounter() as seen:
        torch.ones(3, 5) @ torch.ones(5, 7)
    assert seen.total_flops == 2 * 3 * 5 * 7
    left, right, into = torch.ones(3, 5), torch.ones(5, 7), torch.ones(3, 7)
    with FlopCounter() as seen:
        torch.addmm(into, left, right, beta=2)
        into.addmm_(left, right)
    assert seen.total_flops == 2 * 2 * 3 * 5 * 7


def test_what_is_not_known_is_not_guessed(
    fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """DoRA multiplies weights with each other, whose count does not grow with positions: refused, not miscounted."""
    base = fresh_base("gpt2_tied")
    model = Lora(r=4, use_dora=True).apply(base, tokenizer)
    with pytest.raises(UnsupportedFlopsError, match="over something else than the positions"):
        count_flops(model, base, virtual_tokens=0, gradient_checkpointing=False, computes_all_logits=False)


def test_products_that_are_not_known_are_not_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """BLOOM multiplies with baddbmm and Mixtral in groups: unknown, and not as if they were nothing."""
    from transformers import BloomConfig, BloomForCausalLM, MixtralConfig, MixtralForCausalLM

    mixtral = MixtralConfig(
        hidden_size=32,
        vocab_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=2,
        pad_token_id=None,
    )
    bloom = BloomConfig(hidden_size=32, vocab_size=64, n_layer=1, n_head=4)
    for base in (BloomForCausalLM(bloom), MixtralForCausalLM(mixtral)):
        model = Full().apply(base, tokenizer)
        with pytest.raises(UnsupportedFlopsError):
            count_flops(model, base, virtual_tokens=0, gradient_checkpointing=False, computes_all_logits=False)


def test_a_formula_that_fails_ends_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel is called in a way that its formula does not know, the count is unknown and the step goes on."""

    def ignorant(*_: object, **__: object) -> int:
        raise KeyError("a new argument")

    left, right = torch.ones(2, 3), torch.ones(3, 4)
    monkeypatch.setattr("peftbench.profiler.flop_counter.flop_registry", {torch.ops.aten.mm: ignorant})
    with FlopCounter() as seen:
        product = left @ right @ torch.ones(4, 4)
    assert seen.total_flops is None
    assert product.eq(12).all()
