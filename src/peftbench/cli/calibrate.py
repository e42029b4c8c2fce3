"""The command ``calibrate``: measure this machine's speed, for the times that ``estimate`` and ``fit`` predict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from peftbench.cli.options import print_to_stderr
from peftbench.common.console import cli_errors

if TYPE_CHECKING:
    import torch

    from peftbench.memory.devices import DeviceFacts
    from peftbench.timing.speeds import MeasuredSpeeds

_CalibratedDeviceOption = Annotated[
    Optional[Literal["cpu", "cuda"]],
    typer.Option(help="Device to measure, cpu or cuda. Default: cuda if there is a GPU, otherwise cpu."),
]
_CalibrationFileOption = Annotated[
    Path, typer.Option(help="File to write. Its name must end with .json, so that --device accepts it.")
]


def calibrate(device: _CalibratedDeviceOption = None, out: _CalibrationFileOption = Path("device.json")) -> None:
    """Measure the speed of this machine in about a minute. Write a device file for estimate and fit --device."""
    from peftbench.common.libraries import quiet_libraries

    with cli_errors():
        _check_file_name(out)
        quiet_libraries()
        import torch
        from tqdm.auto import tqdm

        from peftbench.common.filesystem import write_atomically
        from peftbench.timing.calibration import measure_speeds

        kind = _resolve_device(device)
        target = torch.device(kind)
        facts = _describe_device(target)
        with tqdm(desc="calibrating", unit="measurement", disable=None) as progress:
            speeds = measure_speeds(target, facts.torch_name, progress)
        facts = facts.model_copy(update={"measured_speed": speeds})
        write_atomically(out, facts.model_dump_json(indent=1) + "\n")
        print(_summarize(speeds))
        print_to_stderr(f"written to {out}; use it with: peftbench estimate RECIPE.yaml --device {out}")


def _check_file_name(out: Path) -> None:
    """Raise OutOfRangeError unless the name ends with .json."""
    from peftbench.errors import OutOfRangeError

    if out.suffix != ".json":
        raise OutOfRangeError(f"--out {out} does not end with .json; choose a name that does, e.g. device.json")


def _resolve_device(device: Literal["cpu", "cuda"] | None) -> Literal["cpu", "cuda"]:
    """Return the device to measure.

    Raises:
        DeviceError: cuda was requested, and torch finds no GPU.
    """
    import torch

    from peftbench.errors import DeviceError

    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise DeviceError("--device cuda needs a GPU, and torch finds none; use --device cpu")
    return device or ("cuda" if has_gpu else "cpu")


def _describe_device(device: torch.device) -> DeviceFacts:
    """Return the profile of the device without its speed; on a GPU with measured context and workspaces."""
    from peftbench.distributed.accelerator import read_cpu_name
    from peftbench.memory.devices import get_device_facts

    if device.type == "cpu":
        return get_device_facts("cpu").model_copy(update={"torch_name": read_cpu_name()})
    return _measure_gpu(device)


def _measure_gpu(device: torch.device) -> DeviceFacts:
    """Return the GPU's profile: the known one, with context and workspaces measured if the driver reports them."""
    import torch

    from peftbench.memory.devices import get_facts_by_torch_name
    from peftbench.profiler.memory import build_memory_meter

    capability = torch.cuda.get_device_capability(device)
    name, total = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    facts = get_facts_by_torch_name(name, capability).model_copy(
        update={"torch_name": name, "memory": (total, total), "memory_source": "torch's total memory, on this GPU"}
    )
    meter = build_memory_meter(device)
    context = meter.cuda_context_bytes
    if context is None:
        return facts
    before = torch.cuda.memory_allocated(device)
    factor = torch.ones((64, 64), device=device)
    torch.mm(factor, factor)  # torch keeps cuBLAS' workspace as an allocation
    torch.cuda.synchronize(device)
    workspace = max(0, torch.cuda.memory_allocated(device) - before - factor.nbytes)
    return facts.model_copy(
        update={
            "context": (context, context + facts.context[1] - facts.context[0]),
            "workspaces": (workspace, max(workspace, int(facts.workspaces[1]))),
            "overhead_source": "minimum: measured on this GPU before training; maximum: as assumed before",
        }
    )


def _summarize(speeds: MeasuredSpeeds) -> str:
    """Return the best measured speeds in one line."""
    best: dict[str, float] = {}
    for point in speeds.products:
        best[point.dtype] = max(best.get(point.dtype, 0.0), point.flops / point.seconds)
    products = ", ".join(f"{dtype} {rate / 1e12:,.2f}" for dtype, rate in best.items())
    copies = [point for point in speeds.traffic if point.kernel_class == "arithmetic"]
    largest = max(copies, key=lambda point: point.nbytes)
    return (
        f"{speeds.machine}, {speeds.num_threads} threads: products {products} TFLOP/s; memory "
        f"{largest.nbytes / largest.seconds / 1e9:,.0f} GB/s; {speeds.seconds_per_launch * 1e6:,.1f} us per launch"
    )
