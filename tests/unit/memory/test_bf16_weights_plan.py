"""The memory of optimizers that keep weights in bf16, in plans for a GPU, where torch compiles their step."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from peftbench.memory.devices import UNKNOWN_DEVICE
from peftbench.memory.replay import replay_allocator
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.methods.full import Full
from peftbench.optim import AdamW8bitBf16
from peftbench.optim.stochastic_rounding import allocate_compiled_step
from peftbench.profiler.memory_breakdown import MemoryTracker
from tests.helpers.workshop import Workshop

SHAPE = (64, 1024)


def _build_states(*, is_quantized: bool, device: str = "cpu") -> list[Any]:
    """Return two moments: torchao's 8-bit tensors, or bf16 tensors."""
    from torchao.optim.subclass_8bit import OptimState8bit

    if is_quantized:
        return [OptimState8bit.zeros(SHAPE, signed, device=device) for signed in (True, False)]
    return [torch.zeros(SHAPE, dtype=torch.bfloat16, device=device) for _ in range(2)]


def _allocate_step(*, is_quantized: bool) -> int:
    """Return the bytes of the buffers that a planned step of one parameter allocates."""
    weight, gradient = (torch.empty(SHAPE, dtype=torch.bfloat16, device="meta") for _ in range(2))
    states = _build_states(is_quantized=is_quantized, device="meta")
    model = torch.nn.Linear(1, 1)
    tracker = MemoryTracker(model, torch.optim.SGD(model.parameters()), 10, lambda: "optimizer", device_type="meta")
    with tracker:
        allocate_compiled_step(weight, gradient, torch.zeros(()), *states)
    events = [event for event in tracker.iter_events() if event.operation == "aten.empty_like.default"]
    return sum(event.nbytes for event in events if event.is_allocation)


def _count_state_bytes(state: Any) -> int:
    return int(state.codes.nbytes + state.scale.nbytes) if hasattr(state, "codes") else int(state.nbytes)


@pytest.mark.slow
@pytest.mark.parametrize("is_quantized", [True, False])
def test_planned_step_has_the_buffers_of_the_compiled_step(*, is_quantized: bool) -> None:
    """Torch's compiler generates code with these buffers, and none if the states are not quantized."""
    from torch._inductor.utils import run_and_get_code
    from torchao.optim.adam import single_param_adam

    weight, gradient = (torch.randn(SHAPE).bfloat16() for _ in range(2))
    states = _build_states(is_quantized=is_quantized)
    step = torch.compile(single_param_adam, fullgraph=True, dynamic=False)
    rates = (torch.tensor(1e-4), 0.9, 0.999, 0.0, 1e-8, True, True)
    with torch.no_grad():
        _, (code,) = run_and_get_code(step, weight, gradient, torch.tensor(1.0), *states, None, *rates)
    buffers = re.findall(r"= empty_strided_cpu\(\((.*?),? *\), \(.*?\), torch\.(\w+)\)", code)
    sizes = [
        math.prod(int(length) for length in shape.split(",")) * getattr(torch, dtype).itemsize
        for shape, dtype in buffers
    ]
    assert len(sizes) == (5 if is_quantized else 1)
    assert sum(sizes) == _allocate_step(is_quantized=is_quantized) + 8  # the seed of the rounding


def test_optimizer_phase_has_no_copies_of_the_weights(workshop: Workshop) -> None:
    """At the peak are weights, gradients, states, and the buffers of one parameter at most."""
    recipe = workshop.recipe(Full(), optimizer=AdamW8bitBf16(), train={"precision": "bf16", "global_batch_size": 2})
    with MemorySimulation(recipe, UNKNOWN_DEVICE.capability, 1) as simulation:
        simulation.simulate_training(2, 16, 4)
        sizes = [parameter.numel() for parameter in simulation.model.parameters()]
        state_bytes = recipe.optimizer.state_bytes(simulation.training.optimizer.param_groups)
    peak = replay_allocator(simulation.memory_tracker.iter_events()).peak_by_phase["optimizer"]
    by_category = peak.live_bytes_by_category
    assert by_category["gradients"] == 2 * sum(sizes)
    assert 0 < by_category.get("temporaries", 0) <= 2 * 4 * max(sizes) * (1 + 1 / 256)
    assert state_bytes is not None
    assert peak.live_bytes < 2 * by_category["gradients"] + state_bytes + 2 * 4 * max(sizes) * (1 + 1 / 256)


def test_wrapper_tensor_holds_no_memory() -> None:
    """Torchao's 8-bit tensor counts with its inner tensors alone; a cast of its type returns the same ones."""
    model = torch.nn.Linear(1, 1)
    with MemoryTracker(model, torch.optim.SGD(model.parameters()), 10, lambda: None) as tracker:
        before = tracker.find_peak().nbytes
        states = _build_states(is_quantized=True)
        kept = [state.float() for state in states]
        after = sum(event.nbytes if event.is_allocation else -event.nbytes for event in tracker.iter_events())
    assert len(kept) == 2
    assert after - before == sum(_count_state_bytes(state) + state.qmap.nbytes for state in states)
