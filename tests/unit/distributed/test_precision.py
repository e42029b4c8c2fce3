"""``train.precision=auto`` on every shipped device, on CPUs, and with engines and optimizers that refuse one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peftbench.distributed.device_capability import DeviceCapability, detect_device_capability
from peftbench.distributed.engines import ENGINES
from peftbench.distributed.precision import resolve_precision
from peftbench.memory.devices import load_devices
from peftbench.methods.full import Full
from peftbench.optim import OPTIMIZERS
from peftbench.recipe.schema import Budget, Recipe
from tests.helpers.workshop import Workshop

BF16_CPU, OTHER_CPU = DeviceCapability("cpu", has_bf16=True), DeviceCapability("cpu")
T4 = DeviceCapability.from_compute_capability((7, 5))
WITHOUT_BF16 = {"cpu": "fp32", "t4": "fp16", "v100-16gb": "fp16", "v100-32gb": "fp16"}
"""The shipped devices that do not multiply bf16, and what auto is on them."""


@pytest.fixture
def recipe(workshop: Workshop) -> Recipe:
    """Return a recipe of full fine-tuning in auto precision."""
    return workshop.recipe(Full(), train={"precision": "auto"})


@pytest.mark.parametrize("name", load_devices())
def test_auto_precision_of_each_shipped_device(name: str, recipe: Recipe) -> None:
    """It is bf16 from Ampere on, fp16 on Volta and Turing, and fp32 in a plan for a CPU."""
    precision, reason = resolve_precision(recipe, ENGINES["single"], load_devices()[name].capability)
    assert precision == WITHOUT_BF16.get(name, "bf16")
    assert reason


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (BF16_CPU, "bf16"),
        (OTHER_CPU, "fp32"),
        (DeviceCapability.from_compute_capability((6, 1)), "fp32"),
        (DeviceCapability.from_compute_capability((12, 0)), "bf16"),
    ],
)
def test_auto_precision_of_other_devices(device: DeviceCapability, expected: str, recipe: Recipe) -> None:
    """A CPU without bf16 instructions and a GPU older than Volta train in float32."""
    assert resolve_precision(recipe, ENGINES["single"], device)[0] == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_that_refuses_fp16_gets_fp32(engine: str, recipe: Recipe) -> None:
    """On a T4, DeepSpeed's engines train in float32, and the reason is that of the compatibility rule."""
    kind = "deepspeed_cpu_adam" if ENGINES[engine].offloads_to_nvme else "adamw"  # the only one that runs there
    changed = recipe.model_copy(update={"optimizer": OPTIMIZERS[kind]()})  # type: ignore[call-arg]
    precision, reason = resolve_precision(changed, ENGINES[engine], T4)
    refuses_fp16 = ENGINES[engine].is_deepspeed
    assert precision == ("fp32" if refuses_fp16 else "fp16")
    assert ("DeepSpeed's fp16 keeps the weights in fp16" in reason) == refuses_fp16


@pytest.mark.parametrize("kind", [name for name, optimizer in OPTIMIZERS.items() if optimizer.weight_dtype == "bf16"])
def test_optimizer_with_bf16_weights_gets_bf16(kind: str, recipe: Recipe) -> None:
    """It refuses float32, even on a CPU without bf16 instructions."""
    changed = recipe.model_copy(update={"optimizer": OPTIMIZERS[kind]()})  # type: ignore[call-arg]
    assert resolve_precision(changed, ENGINES["single"], OTHER_CPU)[0] == "bf16"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"budget": Budget(memory="1GiB")}, "budget.memory"),
        ({"train": {"micro_batch_size": "auto"}}, "train.micro_batch_size=auto"),
    ],
)
def test_memory_estimate_on_cpu_needs_fp32(changes: dict[str, Any], key: str, workshop: Workshop) -> None:
    """The reason names the key that needs the estimate; a GPU keeps bf16."""
    train = {"precision": "auto"} | changes.pop("train", {})
    recipe = workshop.recipe(Full(), train=train, **changes)
    assert resolve_precision(recipe, ENGINES["single"], BF16_CPU) == (
        "fp32",
        f"{key} needs a memory estimate, and on CPU only fp32 has one",
    )
    assert resolve_precision(recipe, ENGINES["single"], load_devices()["h100"].capability)[0] == "bf16"


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs Linux")
def test_bf16_instructions_are_those_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The detected capability agrees with the flags in /proc/cpuinfo; without a GPU the CPU is used."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    expected = not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
    assert detect_device_capability() == DeviceCapability("cpu", has_bf16=expected)


def test_detection_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The capability is torch's; a launcher or a config that requests the CPU wins."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7 + device, 6))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert detect_device_capability() == DeviceCapability.from_compute_capability((8, 6))
    assert detect_device_capability(use_cpu=True).device_type == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert detect_device_capability().device_type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_detection_matches_torch_on_this_gpu() -> None:
    """Torch's own check of bf16 without emulation agrees."""
    assert detect_device_capability().has_bf16 == torch.cuda.is_bf16_supported(including_emulation=False)
