"""FLOPs of each architecture: the closed form equals the count of dispatched FLOPs, or the exception is listed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from peftbench.common.attention import is_fused_attention
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.methods.select_presets import Attention, LastBlocks, LayerNorm
from peftbench.modeling.activation_checkpointing import enable_checkpointing
from peftbench.profiler.flop_counter import FlopCounter
from peftbench.profiler.flops import NonLinearFlopsError, count_flops
from tests.helpers.architecture_plans import CONFIGS
from tests.helpers.sweeps import mark_others_slow, mark_slow
from tests.unit.profiler.test_flops import ROWS, WIDTH, full_rectangle, with_dropout

METHODS: dict[str, Method] = {"full": Full(), "lora": Lora(r=2)}
NON_LINEAR = {"falcon_h1", "jamba", "jetmoe", "mamba", "mamba2", "minimax", "qwen3_next"}
"""Scans over chunks, and jetmoe's experts: runs count their FLOPs."""
LONGER_THAN_WINDOW = {
    "cohere2",
    "exaone4",
    "llama4_text, chunks",
    "minimax_m3_vl_text, sparse",
    "ministral",
    "mistral, window",
    "mixtral, window",
    "olmo3",
    "phi3, window",
    "qwen2, window",
    "starcoder2, window",
}
"""The closed form assumes rows within the window; for longer rows torch's kernels compute masked pairs too."""
FAST = {"mixtral", "lfm2, convolutions", "bloom", "falcon", "deepseek_v3", "hrm_text", "mamba", "llama4_text"}
POINTS = mark_slow([(case, name) for case in CONFIGS for name in METHODS], lambda point: point[0] in FAST, seed=7)


CHECKPOINTED = ("gpt2", "llama", "qwen3", "gemma2", "olmo2", "gpt_neox", "gptj", "phi", "cohere", "falcon", "mixtral")
"""Architectures with normalizations before and after a block's parts, parallel attention, and experts."""


def build_base(case: str) -> Any:
    """Return a tiny model without dropout, with sdpa attention if the architecture has it."""
    config = AutoConfig.for_model(case.split(",", maxsplit=1)[0], **CONFIGS[case] | {"vocab_size": 320})
    try:
        base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except ValueError:
        base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return with_dropout(base, 0.0)


def count_dispatched_flops(model: torch.nn.Module) -> int | None:
    """Return the FLOPs dispatched in a forward and a backward pass over different tokens."""
    ids = torch.arange(ROWS * WIDTH).reshape(ROWS, WIDTH) % 200 + 3
    with FlopCounter() as counter:
        model(input_ids=ids, use_cache=False).logits.float().sum().backward()
    total: int | None = counter.total_flops
    return total


def test_exceptions_are_architectures_of_the_sweep() -> None:
    """No name of an exception is misspelled."""
    assert len(CONFIGS) > 100
    assert set(CONFIGS) >= NON_LINEAR | LONGER_THAN_WINDOW | FAST


def count_both(
    case: str, method: Method, tokenizer: PreTrainedTokenizerBase, *, checkpointing: bool = False
) -> tuple[int | None, int]:
    """Return the closed form, None if there is none, and the dispatched FLOPs."""
    torch.manual_seed(0)
    base = build_base(case)
    model = method.apply(base, tokenizer).train()
    if checkpointing:
        enable_checkpointing(base)
    dispatched = count_dispatched_flops(model)
    try:
        cost = count_flops(
            model, base, virtual_tokens=0, gradient_checkpointing=checkpointing, computes_all_logits=True
        ).compute_hardware_flops(full_rectangle(method))
    except NonLinearFlopsError:
        cost = None
    assert dispatched
    return cost, dispatched


@pytest.mark.parametrize(("case", "name"), POINTS)
def test_closed_form_equals_dispatched_flops(case: str, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Experts, convolutions, baddbmm, and attention that torch does not fuse are included."""
    cost, dispatched = count_both(case, METHODS[name], tokenizer)
    if cost is None:
        assert case in NON_LINEAR
        return
    assert case not in NON_LINEAR
    if case == "minimax_m3_vl_text, sparse":  # its blocks of keys depend on the length
        assert cost > dispatched
    elif case in LONGER_THAN_WINDOW:
        assert cost < dispatched
    else:
        assert cost == dispatched


@pytest.mark.parametrize("method", [LastBlocks(), Attention(), LayerNorm()], ids=lambda method: method.kind)
@pytest.mark.parametrize("case", mark_others_slow({case: case for case in CHECKPOINTED}, "gptj", "mixtral"))
def test_recomputation_of_partly_trained_blocks_is_counted(
    case: str, method: Method, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Blocks below the trained ones are not recomputed; where attention is parallel to a frozen MLP, the MLP is not."""
    cost, dispatched = count_both(case, method, tokenizer, checkpointing=True)
    assert cost == dispatched


@pytest.mark.parametrize(
    "method", [*METHODS.values(), Lora(r=2, target_modules=["q_proj"])], ids=[*METHODS, "frozen experts"]
)
def test_loop_over_experts_is_counted(
    method: Method, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs older than Ampere run transformers' loop, whose backward pass computes every gradient."""
    monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *_: False)
    cost, dispatched = count_both("mixtral", method, tokenizer)
    assert cost == dispatched


def test_autocast_decides_whether_attention_is_fused() -> None:
    """Rotated queries are float32 next to values in bf16; only autocast, which casts both, lets torch fuse them."""
    query, value = torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_fused_attention(query, query, value, None, 0.0, True, enable_gqa=False)
    assert not is_fused_attention(query, query, value[..., :4].float(), None, 0.0, True, enable_gqa=False)


@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (4, False), (1, True), (4, True)])
def test_convolution_counts_every_gradient(groups: int, transposed: bool) -> None:
    """Each of the two gradients costs as much as the forward pass."""
    convolution = (torch.nn.ConvTranspose1d if transposed else torch.nn.Conv1d)(8, 8, 3, groups=groups)
    inputs = torch.ones(2, 8, 10, requires_grad=True)
    with FlopCounter() as counter:
        output = convolution(inputs)
        output.sum().backward()
    positions = 10 if transposed else 8
    assert counter.total_flops == 3 * 2 * 2 * positions * 8 * (8 // groups) * 3
