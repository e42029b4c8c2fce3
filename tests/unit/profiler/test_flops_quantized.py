"""FLOPs of 4-bit and 8-bit base models: bitsandbytes' kernels, for which torch has no formula, are counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from peftbench.methods.base import Method
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.modeling.activation_checkpointing import enable_checkpointing
from peftbench.profiler.flop_counter import FlopCounter
from peftbench.profiler.flops import count_flops
from tests.helpers.models import ARCHITECTURES
from tests.helpers.sweeps import mark_slow
from tests.unit.profiler.test_flops import count_dispatched_flops, full_rectangle

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bitsandbytes is installed only on Linux")

BITS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4_double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}


def load_quantized(folder: Path, bits: str) -> PreTrainedModel:
    """Load the base model with quantized blocks."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**BITS[bits]), dtype=torch.float32
    )
    layers = [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")]
    assert len(layers) >= 8
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("method", "bits", "checkpointing", "architecture"),
    mark_slow(
        [
            (method, bits, checkpointing, architecture)
            for method in (Lora(r=4), PromptTuning(num_virtual_tokens=5))
            for bits in BITS
            for checkpointing in (False, True)
            for architecture in ARCHITECTURES
        ],
        lambda point: point[3] == "gpt2_tied" and point[2] == (point[0].kind == "lora"),
        seed=5,
    ),
)
def test_closed_form_equals_dispatched_flops(  # noqa: PLR0917
    method: Method,
    bits: str,
    checkpointing: bool,
    architecture: str,
    base_folder: Callable[[str], Path],
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """A quantized base executes the same FLOPs as in float32, dispatched and in closed form."""
    totals = []
    for base in (load_quantized(base_folder(architecture), bits), fresh_base(architecture)):
        model = method.apply(base, tokenizer).train()
        if checkpointing:
            enable_checkpointing(base)
        closed_form = count_flops(
            model,
            base,
            virtual_tokens=method.virtual_tokens,
            gradient_checkpointing=checkpointing,
            computes_all_logits=True,
        )
        assert closed_form.compute_hardware_flops(full_rectangle(method)) == count_dispatched_flops(model)
        totals.append(count_dispatched_flops(model))
    assert totals[0] == totals[1] or checkpointing  # recomputation ends after the last saved tensor, which differs
    assert totals[0] <= totals[1]


def test_counter_matches_known_quantized_products() -> None:
    """Multiply inputs (3, 64) by weights (32, 64) with each bitsandbytes kernel that runs on CPU."""
    import bitsandbytes  # noqa: F401

    kernels = torch.ops.bitsandbytes
    inputs, weight = torch.randn(3, 64), torch.randn(32, 64)
    packed, absmax = kernels.quantize_4bit(weight, 64, "nf4", torch.uint8)
    by_row, stats, _ = kernels.int8_vectorwise_quant(weight.half())
    rows, row_stats, _ = kernels.int8_vectorwise_quant(inputs.half())
    calls: list[Callable[[], Any]] = [
        lambda: kernels.gemm_4bit(inputs, packed, [32, 64], absmax, 64, "nf4"),
        lambda: kernels.int8_linear_matmul(rows, by_row),
        lambda: kernels.int8_scaled_mm(rows, by_row, row_stats, stats),
        lambda: kernels.int8_mixed_scaled_mm(inputs.half(), rows, by_row, row_stats, stats),
    ]
    for call in calls:
        with FlopCounter() as counter:
            call()
        assert counter.total_flops == 2 * 3 * 64 * 32
