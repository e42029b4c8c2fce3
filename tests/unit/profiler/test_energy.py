"""Energy from known counters: RAPL files for CPUs and NVML for GPUs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from peftbench.profiler import energy
from peftbench.profiler.energy import CpuEnergy, GpuEnergy, NoEnergy, build_energy_meter
from peftbench.profiler.nvml import Gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
RANGE = 1_000_000
"""Range of the counters in these tests, in microjoules."""


class Powercap:
    """A powercap directory with two CPU packages, a core domain, and the whole system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = {
            "intel-rapl:0": "package-0",
            "intel-rapl:0:0": "core",
            "intel-rapl:1": "package-1",
            "intel-rapl:2": "psys",
        }
        for zone, name in names.items():
            (folder / zone).mkdir()
            (folder / zone / "name").write_text(name + "\n")
            (folder / zone / "max_energy_range_uj").write_text(f"{RANGE}\n")
            self.set_counter(zone, 0)

    def set_counter(self, zone: str, microjoules: int) -> None:
        """Set a counter."""
        (self.folder / zone / "energy_uj").write_text(f"{microjoules}\n")


@pytest.fixture
def powercap(tmp_path: Path) -> Powercap:
    """Return two CPU packages with counters at 0."""
    return Powercap(tmp_path)


def test_packages_are_added_without_subdomains(powercap: Powercap) -> None:
    """Each package counts once; core and psys would count it again."""
    meter = build_energy_meter(CPU, powercap_dir=powercap.folder)
    assert meter.read_joules() == 0
    for zone, microjoules in (
        ("intel-rapl:0", 300_000),
        ("intel-rapl:0:0", 250_000),
        ("intel-rapl:1", 400_000),
        ("intel-rapl:2", 900_000),
    ):
        powercap.set_counter(zone, microjoules)
    assert meter.read_joules() == 0.7


def test_counter_overflow_is_corrected(powercap: Powercap) -> None:
    """A counter restarts at 0 after its range: from 900,000 to 100,000 it counted 200,001 microjoules."""
    powercap.set_counter("intel-rapl:0", 900_000)
    meter = build_energy_meter(CPU, powercap_dir=powercap.folder)
    powercap.set_counter("intel-rapl:0", 100_000)
    assert meter.read_joules() == 0.200001
    assert meter.read_joules() == 0.200001


def test_counters_are_polled_once_a_minute(powercap: Powercap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Polling at the end of a step reads them before they can wrap twice, but not at every step."""
    now = [0.0]
    monkeypatch.setattr(energy, "time", SimpleNamespace(monotonic=lambda: now[0]))
    meter = build_energy_meter(CPU, powercap_dir=powercap.folder)
    assert isinstance(meter, CpuEnergy)
    meter._last_read_time = 0.0
    for at, microjoules in ((30, 600_000), (61, 800_000), (122, 300_000)):  # the last one wrapped
        now[0] = at
        powercap.set_counter("intel-rapl:0", microjoules)
        meter.poll()
        assert (meter._microjoules == 0) == (at == 30)  # not yet read
    assert meter._microjoules == 800_000 + (300_000 - 800_000) % (RANGE + 1)


def test_unreadable_counters_are_unknown(tmp_path: Path, powercap: Powercap) -> None:
    """A missing directory or package, an unreadable counter, and a counter that disappeared."""
    assert build_energy_meter(CPU, powercap_dir=tmp_path / "none") == NoEnergy()
    meter = build_energy_meter(CPU, powercap_dir=powercap.folder)
    (powercap.folder / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.read_joules() is None
    powercap.set_counter("intel-rapl:0", 5)
    assert meter.read_joules() is None  # the energy in between is lost
    (powercap.folder / "intel-rapl:0" / "energy_uj").write_text("")
    assert build_energy_meter(CPU, powercap_dir=powercap.folder) == NoEnergy()
    assert NoEnergy().read_joules() is None


def test_only_one_rank_per_machine_reads_cpu_counters(powercap: Powercap) -> None:
    """The second rank of a machine reports 0."""
    assert build_energy_meter(CPU, reads_cpu_counters=False, powercap_dir=powercap.folder).read_joules() == 0
    empty = powercap.folder / "empty"
    empty.mkdir()
    assert build_energy_meter(CPU, reads_cpu_counters=False, powercap_dir=empty).read_joules() is None


# --- GPU driver ------------------------------------------------------------------------------------------------------


def raise_not_supported(*_: Any) -> Any:
    """Raise like the binding if the driver does not support a call."""
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def process(pid: int, used: int | None) -> SimpleNamespace:
    """Return one entry of the driver's process list."""
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


PROCESS_LISTS = [
    ([process(7, 100), process(42, 200)], 200),  # this process among others
    ([process(7, 100)], 100),  # the only process: in a container, with a host pid
    ([process(7, 100), process(8, 200)], None),  # cannot be identified
    ([process(42, None)], None),  # the driver does not report it
    ([], None),
]


@pytest.mark.parametrize(("processes", "expected"), PROCESS_LISTS)
def test_process_bytes_by_pid(
    processes: list[SimpleNamespace], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value is None if this process cannot be identified."""
    monkeypatch.setattr("os.getpid", lambda: 42)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: processes)
    assert Gpu("handle").read_process_bytes() == expected


def test_gpu_energy_is_converted_to_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver reports millijoules."""
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: 1234 if handle == "h" else 0)
    assert GpuEnergy(Gpu("h")).read_joules() == 1.234


def test_unsupported_driver_calls_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without an energy counter, a driver that does not list processes, and a missing driver."""
    for name in ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetComputeRunningProcesses", "nvmlInit"):
        monkeypatch.setattr(pynvml, name, raise_not_supported)
    assert Gpu("h").read_joules() is None
    assert Gpu("h").read_process_bytes() is None
    assert Gpu.from_device(CUDA) is None
    assert build_energy_meter(CUDA) == NoEnergy()


def test_gpu_is_found_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's device order can differ from torch's."""
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"12-{device.index}"))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: f"handle of {uuid}")
    assert Gpu.from_device(torch.device("cuda", 3)) == Gpu("handle of GPU-12-3")
