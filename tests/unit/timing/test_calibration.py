"""A calibration file holds the measured speeds and is a device for estimate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from peftbench.cli.app import app
from peftbench.errors import DeviceError
from peftbench.memory.devices import get_device_facts, load_devices
from peftbench.memory.estimate import estimate
from peftbench.memory.plan import Plan
from peftbench.methods.full import Full
from peftbench.report.tables.memory_plan import format_plan
from peftbench.timing import calibration
from peftbench.timing.calibration import CalibrationSizes, measure_speeds
from peftbench.timing.data_sheet import DataSheetSpeeds
from peftbench.timing.kernel_classes import KERNEL_CLASSES
from peftbench.timing.kernels import TRAFFIC_KERNELS
from peftbench.timing.speeds import MeasuredSpeeds
from tests.helpers.workshop import Workshop
from tests.unit.timing.test_roofline import build_speeds

SIZES = CalibrationSizes(
    linears=((8, 16, 16),), batched=((2, 8, 8, 8),), attention=((2, 8, 8),), values=(1 << 12, 1 << 13)
)


class CountedProgress:
    """Counts measurements."""

    total = 0
    done = 0

    def update(self, n: int = 1, /) -> None:
        """Count ``n`` more."""
        self.done += n


@pytest.fixture(scope="module")
def measured() -> MeasuredSpeeds:
    """Return speeds of this machine, from tiny operations."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(calibration, "_SECONDS_PER_POINT", 1e-4)
        patches.setattr(calibration, "_POOL_BYTES", 1 << 16)
        progress = CountedProgress()
        speeds = measure_speeds(torch.device("cpu"), "a machine", progress, SIZES)
        assert progress.done == progress.total > 0
        return speeds


def test_calibration_measures_every_kind(measured: MeasuredSpeeds) -> None:
    """Products in both types and all layouts, attention in both directions, each class of operations."""
    assert {point.dtype for point in measured.products} == {"fp32", "bf16"}
    assert {point.layout for point in measured.products} == {"nn", "nt", "tn"}
    assert {point.direction for point in measured.attention} == {"forward", "backward"}
    assert {point.kernel_class for point in measured.traffic} >= set(KERNEL_CLASSES) - {"adamw8bit"}
    assert measured.seconds_per_launch > 1e-7


def test_each_class_is_measured_by_one_kernel() -> None:
    """8-bit AdamW is measured if bitsandbytes is installed."""
    assert sorted(kernel.kernel_class for kernel in TRAFFIC_KERNELS) == sorted(set(KERNEL_CLASSES) - {"adamw8bit"})


def write_device(path: Path, speeds: MeasuredSpeeds | None = None) -> Path:
    """Write a CPU's device file with these speeds."""
    facts = get_device_facts("cpu").model_copy(update={"measured_speed": speeds or build_speeds()})
    path.write_text(facts.model_dump_json(), encoding="utf-8")
    return path


def test_device_file_round_trip(tmp_path: Path, measured: MeasuredSpeeds) -> None:
    """Reading a written file gives equal facts."""
    facts = get_device_facts(str(write_device(tmp_path / "device.json", measured)))
    assert facts.measured_speed == measured
    assert facts.speeds is facts.measured_speed
    assert facts.libraries == get_device_facts("cpu").libraries


def test_bad_device_files_are_one_sentence(tmp_path: Path) -> None:
    """A missing file, text that is not JSON, a missing key and a key of the wrong type."""
    path = tmp_path / "device.json"
    with pytest.raises(DeviceError, match=r"cannot be read .*; write it with peftbench calibrate --out"):
        get_device_facts(str(path))
    path.write_text("speed", encoding="utf-8")
    with pytest.raises(DeviceError, match="is not a device file: the file: Invalid JSON"):
        get_device_facts(str(path))
    content = json.loads(write_device(path).read_text(encoding="utf-8"))
    del content["measured_speed"]["seconds_per_launch"]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DeviceError, match=r"measured_speed\.seconds_per_launch: Field required") as error:
        get_device_facts(str(path))
    assert "\n" not in str(error.value)
    content["measured_speed"]["seconds_per_launch"] = -1
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DeviceError, match=r"seconds_per_launch: Input should be greater than 0"):
        get_device_facts(str(path))


def test_data_sheets_have_a_source() -> None:
    """Each bandwidth of a shipped device names where it is from."""
    for name, facts in load_devices().items():
        assert (facts.memory_bytes_per_second is None) == (facts.memory_speed_source is None), name
    assert isinstance(get_device_facts("h200").speeds, DataSheetSpeeds)
    assert get_device_facts("cpu").speeds is None


def plan_full(workshop: Workshop, device: str) -> Plan:
    """Return the plan of full fine-tuning."""
    return estimate(workshop.recipe(Full()), get_device_facts(device), device)


def test_estimate_prints_the_time_on_a_calibrated_cpu(
    tmp_path: Path, workshop: Workshop, measured: MeasuredSpeeds
) -> None:
    """One value, the tokens per second and where the speeds are from."""
    plan = plan_full(workshop, str(write_device(tmp_path / "device.json", measured)))
    assert plan.step_time is not None
    assert plan.step_time.seconds[0] == plan.step_time.seconds[1] > 0
    assert plan.step_time.examples == 6
    (line,) = [line for line in format_plan(plan).splitlines() if line.startswith("time: ")]
    assert line.endswith(
        f"tokens/s (from measurements on a machine with {torch.get_num_threads()} threads, torch {torch.__version__})"
    )
    assert " to " not in line


def test_estimate_prints_a_range_by_data_sheet(workshop: Workshop) -> None:
    """Both ends, and that nothing was measured."""
    text = format_plan(plan_full(workshop, "h200"))
    (line,) = [line for line in text.splitlines() if line.startswith("time: ")]
    assert " to " in line
    assert line.endswith("(from the data sheet, not measured)")


def test_plan_without_figures_has_no_time(tmp_path: Path, workshop: Workshop) -> None:
    """An uncalibrated CPU, and speeds that lack a class of operations; the note names it."""
    assert plan_full(workshop, "cpu").step_time is None
    plan = plan_full(workshop, str(write_device(tmp_path / "device.json")))
    assert plan.step_time is None
    assert any(note.startswith("no time is predicted: ") for note in plan.notes)


def test_calibrate_refuses_what_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that --device would not accept, and a GPU that does not exist."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["calibrate", "--out", str(tmp_path / "device.txt")])
    assert result.exit_code == 13
    result = CliRunner().invoke(app, ["calibrate", "--device", "cuda", "--out", str(tmp_path / "device.json")])
    assert result.exit_code == 81
    assert CliRunner().invoke(app, ["calibrate", "--help"]).exit_code == 0
