"""Saved computation: logits at labeled positions only, chunks and packed rows give the same gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from peftbench.data.collate import MicroBatch, PackedSequences
from peftbench.methods.base import Method
from peftbench.modeling import cross_entropy
from peftbench.modeling.attention import causal_attention
from peftbench.modeling.loss import CausalLMLoss, LabeledLogitsLoss, build_loss
from tests.helpers.batches import LENGTHS_AND_PROMPTS, micro_batch, packed
from tests.helpers.methods import every_method
from tests.helpers.models import FAMILIES
from tests.helpers.training import loss_for, trainable_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Fresh = Callable[[str], "PreTrainedModel"]
every_family = pytest.mark.parametrize("architecture", FAMILIES)


def test_model_families_are_not_empty() -> None:
    """The tests below run over at least four model families."""
    assert len(FAMILIES) >= 4


def _apply_method(method: Method, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    torch.manual_seed(3)
    model = method.apply(base, tokenizer)
    method.set_training(model)
    with torch.no_grad():  # LoRA's B starts at zero, so A would have no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def _loss_and_gradients(
    model: nn.Module, loss: CausalLMLoss, batch: MicroBatch
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    with loss.attention_context():
        loss_value = loss(model, batch)
        loss_value.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in trainable_parameters(model).items()}
    assert gradients
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients.values())
    return loss_value.item(), {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}


def _assert_close(
    actual: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]
) -> None:
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().item()
        close = torch.isclose(actual[1][name], gradient, rtol=1e-4, atol=2e-5 * scale)
        assert close.all(), f"{name}: {(actual[1][name] - gradient).abs().max().item()} of {scale}"


@every_method
@every_family
@pytest.mark.parametrize(
    ("multiple", "chunk"),
    [
        pytest.param(None, 2**25, id="padded-whole"),
        pytest.param(None, 3 * 4096, id="padded-chunks", marks=pytest.mark.slow),
        pytest.param(1, 2**25, id="packed-whole", marks=pytest.mark.slow),
        pytest.param(1, 3 * 4096, id="packed-chunks"),
        pytest.param(32, 2**25, id="packed to a multiple-whole"),
        pytest.param(32, 3 * 4096, id="packed to a multiple-chunks", marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_match_masked_attention_with_all_logits(  # noqa: PLR0917
    multiple: int | None,
    chunk: int,
    architecture: str,
    method: Method,
    fresh_base: Fresh,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reference is transformers' attention with masks over padded rows, and logits at every position."""
    plain = _apply_method(method, fresh_base(architecture), tokenizer)
    batch = micro_batch(virtual=method.virtual_tokens)
    expected = _loss_and_gradients(plain, loss_for(plain, labeled_only=False, use_masks=True), batch)
    model = _apply_method(method, fresh_base(architecture), tokenizer)
    loss = loss_for(model)
    assert isinstance(loss, LabeledLogitsLoss)
    assert loss.head_is_output
    assert not loss.uses_masks
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk)
    cheaper_batch = packed(virtual=method.virtual_tokens, multiple=multiple) if multiple else batch
    if multiple == 32:
        assert cheaper_batch.input_ids.shape[1] == 32 * math.ceil(
            packed(virtual=method.virtual_tokens).input_ids.shape[1] / 32
        )
    _assert_close(_loss_and_gradients(model, loss, cheaper_batch), expected)


@every_method
@every_family
def test_packed_documents_do_not_attend_to_each_other(
    architecture: str, method: Method, fresh_base: Fresh, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Changing the tokens of one document changes its logits; those of the others stay bit-identical."""
    model = _apply_method(method, fresh_base(architecture), tokenizer).eval()
    loss = loss_for(model)
    batch = packed(virtual=method.virtual_tokens)
    label_counts = [length - prompt for length, prompt in LENGTHS_AND_PROMPTS]
    assert batch.packed_sequences is not None
    start, end = batch.packed_sequences.cu_seqlens[1:3].tolist()
    changed = batch.input_ids.clone()
    changed[0, start + method.virtual_tokens : end] = changed[0, start + method.virtual_tokens : end].add(7) % 4096
    other = MicroBatch(
        changed, batch.logit_indices, batch.targets, batch.lengths, packed_sequences=batch.packed_sequences
    )
    with torch.no_grad(), loss.attention_context():
        before, after = (loss.logits(model, packed_batch).split(label_counts) for packed_batch in (batch, other))
    assert [torch.equal(one, two) for one, two in zip(before, after, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share_a_row", [True, False])
@pytest.mark.parametrize("rotated", [False, True], ids=["as they are", "rotated"])
def test_cpu_attention_computes_in_float32(
    rotated: bool, share_a_row: bool, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast too, which would cast rotated float32 queries and keys; the output has the 16-bit dtype."""
    calls: list[tuple[torch.dtype, bool]] = []
    original = nn.functional.scaled_dot_product_attention

    def record_call(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return original(query, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", record_call)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 12, 16).to(precision)
    if rotated:
        query, key = query.float(), key.float()
    documents = PackedSequences.from_lengths([5, 7]) if share_a_row else None
    layer = nn.Module()
    with torch.autocast("cpu", precision):
        low, _ = causal_attention(layer, query, key, value, None, packed_sequences=documents)
    assert set(calls) == {(torch.float32, False)}
    assert low.dtype == precision
    high, _ = causal_attention(layer, query.float(), key.float(), value.float(), None, packed_sequences=documents)
    assert torch.equal(low, high.to(precision))


@every_family
def test_operations_after_the_head_are_kept(architecture: str, fresh_base: Fresh) -> None:
    """If a model caps its logits, the head returns logits instead of the loss, and the loss does not change."""

    def capped(base: PreTrainedModel) -> PreTrainedModel:
        def cap(_module: object, _args: object, output: object) -> object:
            output.logits = 3 * torch.tanh(output.logits / 3)  # type: ignore[attr-defined]
            return output

        base.register_forward_hook(cap)
        return base

    batch = micro_batch()
    plain, model = capped(fresh_base(architecture)), capped(fresh_base(architecture))
    expected = _loss_and_gradients(plain, loss_for(plain, labeled_only=False, use_masks=True), batch)
    loss = loss_for(model)
    assert isinstance(loss, LabeledLogitsLoss)
    assert not loss.head_is_output
    _assert_close(_loss_and_gradients(model, loss, packed()), expected)


def test_model_without_an_output_head_computes_all_logits(fresh_base: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note reports it, and the loss does not change."""
    base = fresh_base("gpt2_tied")
    expected = _loss_and_gradients(base, loss_for(base), micro_batch())
    monkeypatch.setattr(type(base), "get_output_embeddings", lambda _: None)
    loss, notes = build_loss(base)
    assert loss.computes_all_logits
    assert notes == ("the output head of gpt2 was not found; logits are computed at every position",)
    _assert_close(_loss_and_gradients(base, loss, packed()), expected)


def test_unsupported_attention_keeps_its_masks(fresh_base: Fresh) -> None:
    """Sliding-window and eager attention run in transformers, each with a reason."""
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=4,
    )
    sliding = AutoModelForCausalLM.from_config(config)
    loss, notes = build_loss(sliding)
    assert loss.uses_masks
    assert any("its masks are more than causal" in note for note in notes)
    base = fresh_base("llama_tied")
    base.config._attn_implementation = "eager"
    assert build_loss(base)[0].mask_reason == "its attention is eager"


def test_generation_is_unchanged_after_a_loss(fresh_base: Fresh) -> None:
    """Outside a loss, the head computes all positions and attention is transformers' own."""
    base = fresh_base("gpt2_tied").eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        loss = loss_for(base)
        with loss.attention_context():
            loss(base, micro_batch())
        assert torch.equal(base(input_ids=ids).logits, before)
    assert base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight", "bias")], ids=["none", "hidden", "head"])
def test_chunked_cross_entropy_matches_one_chunk(frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are in float64 and logits in float32; a frozen input gets no gradient."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values = {"hidden": draw(11, 5), "weight": draw(7, 5), "bias": draw(7)}
    targets = torch.randint(7, (11,), generator=generator)
    results = []
    for limit in (7 * 11, 7 * 4):
        monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", limit)
        inputs = {name: value.clone().requires_grad_(name not in frozen) for name, value in values.items()}
        loss = cross_entropy.chunked_cross_entropy_sum(inputs["hidden"], inputs["weight"], inputs["bias"], targets)
        (loss * 0.25).backward()  # type: ignore[no-untyped-call]
        by_token = cross_entropy.cross_entropy_per_token(inputs["hidden"], inputs["weight"], inputs["bias"], targets)
        assert by_token.shape == (11,)
        assert by_token.sum().item() == pytest.approx(loss.item(), rel=1e-6)
        results.append([loss.detach(), by_token, *(inputs[name].grad for name in inputs)])
    for whole, chunked in zip(*results, strict=True):
        assert (whole is None) == (chunked is None)
        if whole is not None and chunked is not None:
            torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()  # type: ignore[no-untyped-call]
