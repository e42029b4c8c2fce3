"""LoRA without ``target_modules`` on many architectures: what it adapts, and one training step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftbench.methods.lora import Lora
from tests.helpers.architectures import HIDDEN, LAYERS, TINY_CONFIGS, VOCABULARY, build_tiny_model
from tests.helpers.sweeps import mark_slow

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RANK = 2
CASES = [case for case in TINY_CONFIGS if "," not in case]
STACKED = (
    "deepseek_v2",
    "deepseek_v3",
    "flex_olmo",
    "glm4_moe",
    "glm4_moe_lite",
    "mellum",
    "minimax",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "qwen3_moe",
    "solar_open",
)
"""Architectures whose experts peft adapts in the parameters that stack them."""
_STACK = ("experts.down_proj", "experts.gate_up_proj")
_MLP_NAMES = ("down_proj", "gate_proj", "up_proj")
OMITTED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("aria_text", "granitemoe", "granitemoeshared", "hy_v3", "laguna", "minimax_m3_vl_text", "qwen2_moe"), _STACK
    ),
    **dict.fromkeys(("llama4_text", "phimoe"), (*_STACK, "router")),
    # peft converts these names, which shared experts and dense layers have too, to the stacked experts'.
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "solar_open"), _MLP_NAMES),
    "falcon_h1": ("out_proj",),  # Mamba's kernel multiplies it
    "jetmoe": ("input_linear.weight", "output_linear.weight"),
    "recurrent_gemma": ("rg_lru.input_gate_weight", "rg_lru.recurrent_gate_weight"),
}
"""Architectures with matrices that peft does not adapt for all-linear, and their names in the note."""

_ATTENTION = HIDDEN + HIDDEN  # in + out of a square projection
_GROUPED = HIDDEN + HIDDEN // 2  # of a key or value projection with half of the heads
_MLP = HIDDEN + 48
ARITHMETIC: dict[str, int] = {
    # Fused query, key and value; attention output; MLP up (4 x) and down.
    "gpt2": LAYERS * ((HIDDEN + 3 * HIDDEN) + _ATTENTION + 2 * (HIDDEN + 4 * HIDDEN)),
    **dict.fromkeys(("llama", "mistral", "qwen2", "granite"), LAYERS * (2 * _ATTENTION + 2 * _GROUPED + 3 * _MLP)),
    # Fused query, key and value of all heads; attention output; MLP up and down.
    "gpt_neox": LAYERS * ((HIDDEN + 3 * HIDDEN) + _ATTENTION + 2 * _MLP),
    "opt": LAYERS * (4 * _ATTENTION + 2 * (HIDDEN + HIDDEN)),
    "starcoder2": LAYERS * (2 * _ATTENTION + 2 * _GROUPED + 2 * _MLP),
}
"""Sum of in + out of all matrices below the head, from the config's numbers."""


def is_linear(module: nn.Module) -> bool:
    """True for a module with one matrix that multiplies its input."""
    return isinstance(module, (nn.Linear, Conv1D))


def count_by_shapes(base: PreTrainedModel) -> int:
    """Return RANK * (in + out), summed over every matrix except the head's and those of OMITTED."""
    head = base.get_output_embeddings()
    omitted = OMITTED.get(base.config.model_type, ())
    matrices = (
        module
        for name, module in base.named_modules()
        if is_linear(module) and module is not head and name.rsplit(".", 1)[-1] not in omitted
    )
    return RANK * sum(sum(module.weight.shape) for module in matrices)  # type: ignore[union-attr,misc,arg-type]


def count_stacked_experts(base: PreTrainedModel) -> int:
    """Return the same for parameters that stack the experts' matrices; gate_up_proj joins two matrices of an expert."""
    count = 0
    for name, parameter in base.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            count += 2 * RANK * len(parameter) * sum(parameter.shape[1:])
        elif name.endswith("experts.down_proj"):
            count += RANK * len(parameter) * sum(parameter.shape[1:])
        elif name.endswith(".gate.weight"):  # the router
            count += RANK * sum(parameter.shape)
    return count


def train_one_step(model: nn.Module) -> float:
    """Take one SGD step on random tokens and return the gradient norm of the trained parameters."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (2, 12), generator=generator)
    output: Any = model(input_ids=tokens, labels=tokens, use_cache=False)
    output.loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.SGD(trained, lr=0.1).step()
    return float(sum(p.grad.norm() for p in trained if p.grad is not None))


def test_sweep_covers_55_model_types() -> None:
    """The names of the special cases are in the list."""
    assert len(CASES) >= 55
    assert set(STACKED) | set(OMITTED) | set(ARITHMETIC) <= set(CASES)


@pytest.mark.parametrize("case", mark_slow([(case,) for case in CASES], lambda point: point[0] in ARITHMETIC, seed=20))
def test_lora_without_targets_trains_every_matrix_but_the_head(case: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """The trained parameters equal the count by shapes and, where given, the config's arithmetic; a step trains all.

    A note names the matrices that are left out.
    """
    base, method = build_tiny_model(case), Lora(r=RANK)
    expected = count_by_shapes(base) + (count_stacked_experts(base) if case in STACKED else 0)
    assert method.trainable_parameters(base) == expected
    if case in ARITHMETIC:
        assert expected == RANK * ARITHMETIC[case]
    notes = method.list_notes(base)
    names = ", ".join(OMITTED.get(case, ()))
    assert notes == ([f"all-linear leaves out {names}, which peft does not adapt in {case}"] if names else [])
    head = base.get_output_embeddings()
    model = method.apply(base, tokenizer).train()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert not any("lora_" in name for name, _ in head.named_parameters())  # type: ignore[union-attr]
    assert train_one_step(model) > 0
