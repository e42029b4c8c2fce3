"""Energy from counters of known value: the processors' in files as Linux shows them, the GPU's as its driver tells."""

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
"""Microjoules that a counter of these tests can show."""


class Powercap:
    """A folder as Linux shows RAPL's: two processors, a part of one, and the whole system once more."""

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
            self.show(zone, 0)

    def show(self, zone: str, microjoules: int) -> None:
        """Let a counter stand at this value."""
        (self.folder / zone / "energy_uj").write_text(f"{microjoules}\n")


@pytest.fixture
def powercap(tmp_path: Path) -> Powercap:
    """Two processors whose counters stand at 0."""
    return Powercap(tmp_path)


def test_processors_are_added_and_their_parts_are_not(powercap: Powercap) -> None:
    """Each processor counts once; a part of one and the whole system would count it again."""
    meter = build_energy_meter(CPU, powercap_dir=powercap.folder)
    assert meter.read_joules() == 0
    for zone, microjoules in (
        ("intel-rapl:0", 300_000),
        ("intel-rapl:0:0", 250_000),
        ("intel-rapl:1", 400_000),
        ("intel-rapl:2", 900_000),
    ):
        powercap.show(zone, microjoules)
    assert meter.read_joules() == 0.7


def test_a_counter_that_runs_over(powercap: Powercap) -> None:
    """Past its range a counter starts at 0 again: 900,000, then 100,000, are 200,001 microjoules apart."""
    powercap.show("intel-rapl:0", 900_000)
    meter = build_energy_meter(CPU, powercap_dir=powercap.folder)
    powercap.show("intel-rapl:0", 100_000)
    assert meter.read_joules() == 0.200001
    assert meter.read_joules() == 0.200001


def test_a_counter_is_looked_at_before_it_runs_over_twice(powercap: Powercap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a minute, at the end of a step, and not at every step."""
    now = [0.0]
    monkeypatch.setattr(energy, "time", SimpleNamespace(monotonic=lambda: now[0]))
    meter = build_energy_meter(CPU, powercap_dir=powercap.folder)
    assert isinstance(meter, CpuEnergy)
    meter._last_read_time = 0.0
    for at, shown in ((30, 600_000), (61, 800_000), (122, 300_000)):  # the last one ran over
        now[0] = at
        powercap.show("intel-rapl:0", shown)
        meter.poll()
        assert (meter._microjoules == 0) == (at == 30)  # not yet looked at
    assert meter._microjoules == 800_000 + (300_000 - 800_000) % (RANGE + 1)


def test_where_the_processors_do_not_tell(tmp_path: Path, powercap: Powercap) -> None:
    """No folder, no processor in it, a counter that only root may read, a counter that is gone: unknown."""
    assert build_energy_meter(CPU, powercap_dir=tmp_path / "none") == NoEnergy()
    meter = build_energy_meter(CPU, powercap_dir=powercap.folder)
    (powercap.folder / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.read_joules() is None
    powercap.show("intel-rapl:0", 5)
    assert meter.read_joules() is None  # what was counted meanwhile is lost, and less than all is no answer
    (powercap.folder / "intel-rapl:0" / "energy_uj").write_text("")
    assert build_energy_meter(CPU, powercap_dir=powercap.folder) == NoEnergy()
    assert NoEnergy().read_joules() is None


def test_one_process_of_a_machine_counts_for_all(powercap: Powercap) -> None:
    """Two ranks on one machine share its processors: the second adds nothing."""
    assert build_energy_meter(CPU, reads_cpu_counters=False, powercap_dir=powercap.folder).read_joules() == 0
    empty = powercap.folder / "empty"
    empty.mkdir()
    assert build_energy_meter(CPU, reads_cpu_counters=False, powercap_dir=empty).read_joules() is None


# --- the driver ------------------------------------------------------------------------------------------------------


def refuse(*_: Any) -> Any:
    """What the binding does where the driver cannot answer."""
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def process(pid: int, used: int | None) -> SimpleNamespace:
    """One process, as the driver lists them."""
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


LISTS = [
    ([process(7, 100), process(42, 200)], 200),  # ours among others
    ([process(7, 100)], 100),  # alone: in a container under another number
    ([process(7, 100), process(8, 200)], None),  # none of them is known to be ours
    ([process(42, None)], None),  # the driver may not say
    ([], None),
]


@pytest.mark.parametrize(("listed", "expected"), LISTS)
def test_memory_of_this_process(
    listed: list[SimpleNamespace], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's figure for this process, None where it cannot be told apart."""
    monkeypatch.setattr("os.getpid", lambda: 42)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: listed)
    assert Gpu("handle").read_process_bytes() == expected


def test_energy_of_the_board_is_in_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver counts thousandths of a joule."""
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: 1234 if handle == "h" else 0)
    assert GpuEnergy(Gpu("h")).read_joules() == 1.234


def test_what_the_driver_refuses_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card without the counter, and a driver that does not list processes."""
    for name in ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetComputeRunningProcesses", "nvmlInit"):
        monkeypatch.setattr(pynvml, name, refuse)
    assert Gpu("h").read_joules() is None
    assert Gpu("h").read_process_bytes() is None
    assert Gpu.from_device(CUDA) is None
    assert build_energy_meter(CUDA) == NoEnergy()


def test_the_gpu_is_found_by_its_name_for_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's first GPU need not be torch's first."""
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"12-{device.index}"))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: f"handle of {uuid}")
    assert Gpu.from_device(torch.device("cuda", 3)) == Gpu("handle of GPU-12-3")
