"""Emulated autocast on the meta device casts exactly as often as torch's autocast on CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from peftbench.distributed.device_capability import DeviceCapability
from peftbench.memory.simulation.device import DeviceEmulation
from tests.helpers.live_bytes import LiveBytes


class Casts(TorchDispatchMode):
    """Counts cast operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def count_casts(device: str, block: AbstractContextManager[Any], *, trained: bool) -> tuple[int, torch.dtype]:
    """Return the number of casts in two products with one weight, and the dtype of the output."""
    weight = nn.Parameter(torch.zeros(4, 4, device=device), requires_grad=trained)
    inputs = torch.zeros(2, 4, device=device)
    with Casts() as casts, block:
        output = functional.linear(functional.linear(inputs, weight), weight)
    return casts.count, output.dtype


@pytest.mark.parametrize("trained", [True, False])
def test_weight_casts_are_cached_like_in_torch(trained: bool) -> None:
    """One cast of a trained weight for all its uses, one per use of a frozen weight."""
    real = count_casts("cpu", torch.autocast("cpu", dtype=torch.bfloat16), trained=trained)
    emulation = DeviceEmulation(DeviceCapability("cpu"), torch.bfloat16, has_padding=True)
    with emulation:
        assert count_casts("meta", emulation.autocast(), trained=trained) == real
        assert count_casts("meta", emulation.autocast(), trained=trained) == real  # the cache ends with its block
        assert count_casts("meta", emulation.autocast(enabled=False), trained=trained) == (0, torch.float32)
    assert real[0] == (2 if trained else 3)


def count_live_casts(device: str, block: AbstractContextManager[Any]) -> list[int]:
    """Use and free 50 weights, one after another; return how many of their casts live in the block and after it."""
    storages: list[StorageWeakRef] = []

    class CastStorages(Casts):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and args[0].shape == (4, 4):
                storages.append(StorageWeakRef(output.untyped_storage()))
            return output

    alive = []
    with CastStorages(), torch.no_grad():
        with block:
            for _ in range(50):
                weight = nn.Parameter(torch.zeros(4, 4, device=device))
                functional.linear(torch.zeros(2, 4, device=device), weight)
                del weight
            alive.append(sum(not storage.expired() for storage in storages))
        alive.append(sum(not storage.expired() for storage in storages))
    return alive


def test_casts_of_freed_weights_live_as_long_as_in_torch() -> None:
    """ZeRO-3 frees gathered weights in autocast; their casts stay until it ends, also when Python reuses an id."""
    emulation = DeviceEmulation(DeviceCapability("cpu"), torch.bfloat16, has_padding=False)
    with emulation:
        emulated = count_live_casts("meta", emulation.autocast())
    assert emulated == count_live_casts("cpu", torch.autocast("cpu", torch.bfloat16)) == [50, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_math_kernel_memory_matches_cpu(dtype: torch.dtype, key_heads: int, mask: str | None) -> None:
    """Saved bytes and the peak of each pass equal those of torch's math kernel on CPU."""

    def run(device: str) -> tuple[int, int, int]:
        live = LiveBytes(device)
        query, key, value = (
            torch.zeros(2, heads, 20, 5, device=device, dtype=dtype, requires_grad=True)
            for heads in (4, key_heads, key_heads)
        )
        given = None if mask is None else torch.ones(2, 1, 20, 20, device=device, dtype=getattr(torch, mask))
        if given is not None and given.dtype != torch.bool:
            given = given.to(dtype)
        arguments: dict[str, Any] = {"attn_mask": given, "is_causal": mask is None, "enable_gqa": key_heads != 4}
        with live:
            output = functional.scaled_dot_product_attention(query, key, value, **arguments)
            saved, forward_peak = live.live, live.peak
            output.sum().backward()
        return saved, forward_peak, live.peak

    with sdpa_kernel(SDPBackend.MATH):
        real = run("cpu")
    capability = (8, 0) if dtype == torch.float32 else (7, 5)  # no fused kernel supports a head dimension of 5 there
    with DeviceEmulation(DeviceCapability("cuda", capability), None, has_padding=False):
        assert run("meta") == real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_product_has_the_layout_of_the_real_one(dtype: torch.dtype) -> None:
    """Rows are padded to a multiple of 16 bytes."""

    def multiply(device: str) -> torch.Tensor:
        inputs, weights = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((12, 16), (3, 16, 8)))
        offsets = torch.tensor([4, 8, 12], dtype=torch.int32, device=device)
        return functional.grouped_mm(inputs, weights[..., :5], offs=offsets)

    real = multiply("cpu")
    emulation = DeviceEmulation(DeviceCapability("cpu"), None, has_padding=False)
    with emulation.patch_libraries(), emulation:
        emulated = multiply("meta")
    assert emulated.stride() == real.stride()
    assert emulated.untyped_storage().nbytes() == real.untyped_storage().nbytes()


def test_choice_of_a_cpu_kernel_counts_no_tensors() -> None:
    """The tensors that ask torch for its kernel are not those of the model."""
    query = torch.zeros(2, 4, 32, 16, device="meta")
    live = LiveBytes("cpu")
    with live, DeviceEmulation(DeviceCapability("cpu"), None, has_padding=False):
        functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert live.peak == 0
