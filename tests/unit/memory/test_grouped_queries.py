"""Plans of models with grouped queries: live bytes equal to an independent trace with the kernel that runs.

The trace runs a plain transformers model on the meta device. It forces the expected kernel, casts by hand what autocast
casts, and counts the storages of two steps; of peftbench it uses only the batch's tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftbench.memory.devices import get_device_facts
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.optim import OPTIMIZERS
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.models import llama_config
from tests.helpers.sweeps import mark_slow
from tests.helpers.workshop import Workshop

ROWS, WIDTH, LABELS = 2, 1001, 4
HEADS, KEY_HEADS, LAYERS = 8, 2, 3
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Setting(NamedTuple):
    """A device, a precision and a padding, and the kernel that training uses."""

    device: str
    precision: str
    padding: str
    kernel: str
    repeats_keys: bool
    """True if the kernel does not take grouped queries, so that torch would store the scores."""


SETTINGS = [
    Setting("t4", "fp16", "longest", "efficient", repeats_keys=True),
    Setting("t4", "fp32", "longest", "efficient", repeats_keys=True),
    Setting("t4", "fp16", "free", "efficient", repeats_keys=True),
    Setting("a10g", "bf16", "longest", "flash", repeats_keys=False),
    Setting("a10g", "fp16", "longest", "flash", repeats_keys=False),
    Setting("a10g", "fp32", "longest", "efficient", repeats_keys=True),
    Setting("a10g", "bf16", "free", "varlen", repeats_keys=False),
    Setting("a10g", "fp32", "free", "efficient", repeats_keys=True),
    Setting("h100", "bf16", "longest", "cudnn", repeats_keys=False),
    Setting("h100", "fp16", "longest", "cudnn", repeats_keys=False),
    Setting("h100", "fp32", "longest", "efficient", repeats_keys=True),
    Setting("h100", "bf16", "free", "varlen", repeats_keys=False),
]
LOOP_SCALARS = 8
"""Bytes of two scalars that the training loop keeps, the scaled loss and the sum of losses; the trace has neither."""
INPUTS = {"input_ids", "position_ids"}
OPTIMIZER_CLASSES: dict[str, Any] = dict(OPTIMIZERS)
METHODS: dict[str, Method] = {"full": Full(), "lora": Lora(r=4, target_modules=["q_proj", "v_proj"])}


def grouped_config() -> PreTrainedConfig:
    """Return a Llama whose scores take more memory than its other activations."""
    return llama_config(
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        num_hidden_layers=LAYERS,
        max_position_embeddings=2048,
        use_cache=False,
    )


class ForcedKernel(TorchFunctionMode):
    """Casts the inputs of linear layers and attention, and calls the kernel of a setting."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting, self.dtype = setting, DTYPES[setting.precision]
        self.bounds = torch.zeros(ROWS + 1, dtype=torch.int32, device="meta")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            return self.linear(*args)
        return func(*args, **kwargs)

    def cast(self, tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else tensor.to(self.dtype)

    def linear(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        bias, weight = self.cast(bias), self.cast(weight)
        return functional.linear(self.cast(inputs), weight, bias)

    def attend(
        self, _module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """Implement transformers' attention signature."""
        value, key, query = (self.cast(tensor) for tensor in (value, key, query))
        if self.setting.padding == "longest":
            return self.attend_rows(query, key, value), None
        if self.setting.kernel == "varlen":
            query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
            output = torch.ops.torch_attn._varlen_attn(
                query, key, value, self.bounds, self.bounds, WIDTH, WIDTH, True, None, [-1, 0], True
            )[0]
            return output[None], None
        parts = zip(*(tensor.split([WIDTH] * ROWS, dim=2) for tensor in (query, key, value)), strict=True)
        return torch.cat([self.attend_rows(*part) for part in parts], dim=1), None

    def attend_rows(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        kernels = torch.ops.aten
        if self.setting.repeats_keys:
            key, value = (
                tensor[:, :, None].expand(-1, -1, HEADS // KEY_HEADS, -1, -1).reshape(query.shape)
                for tensor in (key, value)
            )
        if self.setting.kernel == "efficient":
            output = kernels._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, True)[0]
        elif self.setting.kernel == "flash":
            output = kernels._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]
        else:
            output = kernels._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, True)[0]
        return output.transpose(1, 2).contiguous()  # type: ignore[no-any-return]


def trace_plain_model(setting: Setting, method: str, batch: Any) -> int:
    """Return the peak of live bytes in the second of two steps of a plain model with SGD and momentum."""
    forced = ForcedKernel(setting)
    ALL_ATTENTION_FUNCTIONS.register("forced_kernel", forced.attend)  # without masks, which need values
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(grouped_config(), attn_implementation="forced_kernel")
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, foreach=True)
    base = model.get_base_model() if method == "lora" else model

    def compute_loss() -> torch.Tensor:
        inputs = {key: value.to("meta") for key, value in batch.model_inputs.items() if key in INPUTS}
        hidden = base.model(**inputs, use_cache=False).last_hidden_state
        labeled = hidden.flatten(0, 1).index_select(0, batch.logit_indices.to("meta"))
        return functional.cross_entropy(base.lm_head(labeled).float(), batch.targets.to("meta"), reduction="sum")

    def run_step() -> None:
        compute_loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    live = LiveBytes()
    for tensor in (*model.parameters(), *model.buffers()):
        live.add(tensor)
    if setting.kernel == "varlen":
        live.add(forced.bounds)
    with live, forced:
        run_step()
        live.peak = live.live
        run_step()
    return live.peak


FAST = {("t4", "fp16", "longest", "lora"), ("a10g", "bf16", "free", "full"), ("h100", "bf16", "longest", "lora")}
POINTS = mark_slow(
    [(setting, method) for setting in SETTINGS for method in METHODS],
    keep=lambda point: (*point[0][:3], point[1]) in FAST,
    seed=21,
)


@pytest.mark.parametrize(("setting", "method"), POINTS)
def test_grouped_queries_are_planned_with_the_kernel_that_runs(
    setting: Setting, method: str, workshop: Workshop, tmp_path: Path
) -> None:
    """Live bytes equal those of the plain model with that kernel plus LOOP_SCALARS."""
    (tmp_path / "config.json").write_text(json.dumps(grouped_config().to_dict()), encoding="utf-8")
    recipe = workshop.recipe(
        METHODS[method],
        model={"path": str(tmp_path), "dtype": "fp32"},  # the plain model's
        optimizer=OPTIMIZER_CLASSES["sgd"](momentum=0.9),
        train={"precision": setting.precision, "global_batch_size": ROWS, "max_grad_norm": None},
        data={"max_length": WIDTH, "padding": setting.padding},
    )
    simulation = MemorySimulation(recipe, get_device_facts(setting.device).capability, 1)
    simulation.step_flops(ROWS, WIDTH, LABELS)  # counts in float32, which must not be noted
    with simulation:
        simulation.simulate_training(ROWS, WIDTH, LABELS)
        with _disable_current_modes():
            batch = simulation._build_micro_batch(ROWS, WIDTH, LABELS)
    notes = " ".join(simulation.emulation.notes)
    assert notes.startswith("keys and values are repeated for each query head") == setting.repeats_keys
    assert ("memory-efficient attention does not support 8 query heads" in notes) == setting.repeats_keys
    if setting.kernel != "varlen":
        assert {choice.kernel for choice in simulation.emulation.kernel_choices} == {setting.kernel}
    peak = simulation.memory_tracker.find_peak()
    assert peak.nbytes == trace_plain_model(setting, method, batch) + LOOP_SCALARS
