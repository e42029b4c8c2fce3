"""Memory peaks of known size, and the phases that they count in."""

from __future__ import annotations

import gc
import mmap
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peftbench.profiler.memory import (
    CudaMemoryMeter,
    MemoryMeter,
    RssMeter,
    _measure_cuda_context_bytes,
    build_memory_meter,
    max_memory,
    max_over_ranks,
)
from peftbench.profiler.nvml import Gpu
from peftbench.profiler.probe import Probe
from peftbench.record import Memory

MIB = 2**20
SLACK = 4 * MIB
"""Bytes that the interpreter may allocate during a test, since RSS is that of the whole process."""


def touch(size: int) -> None:
    """Make ``size`` bytes resident and release them."""
    with mmap.mmap(-1, size) as pages:
        for start in range(0, size, mmap.PAGESIZE):
            pages[start] = 1


def above_baseline(memory: Memory) -> int:
    """Return the peak above the baseline."""
    if memory.rss_bytes is None or memory.baseline_rss_bytes is None:
        pytest.skip("this kernel does not report a process's peak RSS")
    return memory.rss_bytes - memory.baseline_rss_bytes


def test_peak_excludes_a_pause() -> None:
    """Memory that a tracker uses between steps is in no peak of the phase; that of steps before and after is."""
    probe = Probe(torch.device("cpu"))
    with probe.phase("train"):
        touch(64 * MIB)
        with probe.paused():
            touch(512 * MIB)
            with probe.exclude_memory():  # a checkpoint
                touch(256 * MIB)
        touch(32 * MIB)
    assert above_baseline(probe.memory["train"]) == pytest.approx(64 * MIB, abs=SLACK)


@pytest.mark.parametrize("size", [64 * MIB, 256 * MIB])
def test_released_pages_count_in_the_peak(size: int) -> None:
    """The peak of a lap includes pages that were released in it."""
    meter = RssMeter()
    meter.lap()
    touch(size)
    assert above_baseline(meter.lap()) == pytest.approx(size, abs=SLACK)


def test_peak_includes_a_tensor() -> None:
    """The peak grows by the bytes of the tensor."""
    meter = RssMeter()
    meter.lap()
    tensor = torch.ones(32 * MIB)
    peak = above_baseline(meter.lap())
    assert peak == pytest.approx(tensor.numel() * tensor.element_size(), abs=SLACK)


def test_baseline_excludes_garbage() -> None:
    """Uncollected cycles are freed before the baseline is read."""
    RssMeter()
    before = RssMeter().lap().baseline_rss_bytes
    cycle: list[Any] = [mmap.mmap(-1, 64 * MIB)]
    for start in range(0, 64 * MIB, mmap.PAGESIZE):
        cycle[0][start] = 1
    cycle.append(cycle)
    gc.disable()
    try:
        del cycle
        after = RssMeter().lap().baseline_rss_bytes
    finally:
        gc.enable()
    if before is None or after is None:
        pytest.skip("this kernel does not report a process's peak RSS")
    assert after - before < SLACK


def test_peaks_of_phases_are_independent() -> None:
    """A large allocation in evaluation does not count in training or in later phases."""
    probe = Probe(torch.device("cpu"))
    for phase, size in (("build", 256), ("train", 64), ("evaluate", 512), ("train", 32), ("save", 1)):
        with probe.phase(phase):
            touch(size * MIB)
    assert above_baseline(probe.memory["train"]) == pytest.approx(64 * MIB, abs=SLACK)
    assert above_baseline(probe.memory["evaluate"]) == pytest.approx(512 * MIB, abs=SLACK)
    assert above_baseline(probe.memory["save"]) == pytest.approx(1 * MIB, abs=SLACK)


def test_phase_entered_twice_keeps_larger_peak() -> None:
    """The peak of a phase is the maximum over its sections."""
    probe = Probe(torch.device("cpu"))
    for size in (16, 128, 32):
        with probe.phase("build"):
            touch(size * MIB)
    assert above_baseline(probe.memory["build"]) == pytest.approx(128 * MIB, abs=SLACK)


def test_phase_that_raises_keeps_its_peak() -> None:
    """The peak is recorded although the phase raised."""
    probe = Probe(torch.device("cpu"))

    def fail() -> None:
        with probe.phase("train"):
            touch(64 * MIB)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert above_baseline(probe.memory["train"]) == pytest.approx(64 * MIB, abs=SLACK)


def test_unknown_peak_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without permission to reset the peak, all fields are None."""

    class ReadOnlyFile:
        def write_text(self, *_: object, **__: object) -> None:
            raise PermissionError

    monkeypatch.setattr("peftbench.profiler.memory._PROC_CLEAR_REFS", ReadOnlyFile())
    meter = RssMeter()
    meter.lap()
    assert meter.lap() == Memory()


def test_in_use_bytes_count_mapped_memory() -> None:
    """Unmapped memory does not count, and a reading keeps the peak. (malloc may keep the pages of a freed tensor.)"""
    meter = RssMeter()
    meter.lap()
    touch(64 * MIB)
    before = meter.read_in_use_bytes()
    size = 128 * MIB
    mapped = mmap.mmap(-1, size)
    for start in range(0, size, mmap.PAGESIZE):
        mapped[start] = 1
    with_mapped = meter.read_in_use_bytes()
    mapped.close()
    after = meter.read_in_use_bytes()
    peak = above_baseline(meter.lap())
    if before is None or with_mapped is None or after is None:
        pytest.skip("this system does not report a process's RSS")
    assert with_mapped - before == pytest.approx(size, abs=SLACK)
    assert after == pytest.approx(before, abs=SLACK)
    assert peak == pytest.approx(size, abs=SLACK)


def test_max_memory_by_field() -> None:
    """GPU peaks are compared field by field; a peak RSS keeps its own baseline."""
    first = Memory(allocated_bytes=5, reserved_bytes=8, rss_bytes=20, baseline_rss_bytes=1)
    second = Memory(allocated_bytes=7, reserved_bytes=6, rss_bytes=10, baseline_rss_bytes=9)
    expected = Memory(allocated_bytes=7, reserved_bytes=8, rss_bytes=20, baseline_rss_bytes=1)
    assert max_memory(first, second) == max_memory(second, first) == expected
    assert max_memory(None, second) == second
    assert max_memory(Memory(), Memory()) == Memory()


def test_max_memory_adds_retries() -> None:
    """Allocation retries of two sections are added."""
    first, second = Memory(num_alloc_retries=2, process_bytes=9), Memory(num_alloc_retries=3, inactive_split_bytes=4)
    assert max_memory(first, second) == Memory(num_alloc_retries=5, process_bytes=9, inactive_split_bytes=4)


def test_max_over_ranks_by_field_and_phase() -> None:
    """Retries of ranks are not added."""
    first = {"train": Memory(allocated_bytes=5, num_alloc_retries=2), "save": Memory(allocated_bytes=1)}
    second = {"train": Memory(allocated_bytes=4, reserved_bytes=9, num_alloc_retries=3)}
    expected = {"train": Memory(allocated_bytes=5, reserved_bytes=9, num_alloc_retries=3), "save": first["save"]}
    assert max_over_ranks([first, second]) == max_over_ranks([second, first]) == expected
    assert max_over_ranks([first]) == first
    assert max_over_ranks([]) == {}


def test_cuda_meter_reads_torch_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks are read and reset; retries are counted since the previous lap."""
    stats: dict[str, Any] = {
        "allocated_bytes": {"all": {"peak": 10, "current": 1}},
        "reserved_bytes": {"all": {"peak": 20, "current": 2}},
        "inactive_split_bytes": {"all": {"peak": 5, "current": 3}},
        "num_alloc_retries": 4,
    }
    resets: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 30)
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda _: stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(Gpu, "from_device", classmethod(lambda *_: SimpleNamespace(read_process_bytes=lambda: 500)))
    _measure_cuda_context_bytes.cache_clear()
    meter = CudaMemoryMeter(torch.device("cuda", 0))
    assert (meter.cuda_context_bytes, meter.read_process_bytes(), len(resets)) == (470, 500, 1)
    assert (meter.read_in_use_bytes(), len(resets)) == (472, 1)  # reserved bytes plus the context
    stats["num_alloc_retries"] = 6
    expected = Memory(allocated_bytes=10, reserved_bytes=20, inactive_split_bytes=5, num_alloc_retries=2)
    assert meter.lap() == expected
    assert meter.lap() == expected.model_copy(update={"num_alloc_retries": 0})
    assert len(resets) == 3
    del stats["inactive_split_bytes"], stats["num_alloc_retries"]
    assert meter.lap() == Memory(allocated_bytes=10, reserved_bytes=20)  # a missing counter is not zero
    stats["num_alloc_retries"] = 7
    in_use = [900]
    monkeypatch.setattr(Gpu, "from_device", classmethod(lambda *_: SimpleNamespace(read_process_bytes=in_use.pop)))
    assert CudaMemoryMeter(torch.device("cuda", 0)).cuda_context_bytes == 470  # cached from the first measurement
    _measure_cuda_context_bytes.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_includes_a_freed_tensor_on_cuda() -> None:
    """A freed tensor counts in the peak of its lap, on top of what was allocated before."""
    device = torch.device("cuda", 0)
    meter: MemoryMeter = build_memory_meter(device)
    assert isinstance(meter, CudaMemoryMeter)
    torch.cuda.empty_cache()
    meter.lap()
    before = meter.lap().allocated_bytes
    tensor = torch.ones(32 * MIB, device=device)
    del tensor
    after = meter.lap()
    assert before is not None
    assert after.allocated_bytes == before + 128 * MIB
    assert after.reserved_bytes is not None
    assert after.reserved_bytes >= after.allocated_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_step_part_peaks_on_cuda() -> None:
    """Tensors of known size count in the part that created them."""
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    probe = Probe(device)
    before = torch.cuda.memory_allocated(device)
    with probe.training(untimed_steps=0), probe.step():
        for part, size in (("forward", 64), ("backward", 128), ("optimizer", 32)):
            with probe.part(part):
                torch.ones(size * MIB, dtype=torch.uint8, device=device)
    peaks = {part: memory.allocated_bytes for part, memory in probe.step_memory.items()}
    assert peaks == {"forward": before + 64 * MIB, "backward": before + 128 * MIB, "optimizer": before + 32 * MIB}
    assert probe.memory["train"].allocated_bytes == before + 128 * MIB
