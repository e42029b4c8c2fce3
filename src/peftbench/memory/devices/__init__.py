"""Device profiles, one JSON file each: total memory, CUDA context and library workspaces, and speeds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator

from peftbench.common.filesystem import load_json_resources
from peftbench.distributed.device_capability import DeviceCapability
from peftbench.errors import DeviceError, did_you_mean
from peftbench.timing.data_sheet import DataSheetSpeeds
from peftbench.timing.speeds import DeviceSpeeds, MeasuredSpeeds


class DeviceFacts(BaseModel):
    """Memory of one device model outside of tensors. Ranges are minimum and maximum if nothing was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    torch_name: str
    """The name that torch.cuda.get_device_name returns."""
    memory: tuple[ByteSize, ByteSize]
    """Total memory that torch reports: minimum and maximum, equal if a source has torch's number."""
    memory_source: str
    workspaces: tuple[ByteSize, ByteSize]
    """Workspaces of cuBLAS and similar libraries: minimum and maximum."""
    context: tuple[ByteSize, ByteSize]
    """The driver's context and lazily loaded kernels: minimum and maximum."""
    libraries: tuple[ByteSize, ByteSize] = (ByteSize(0), ByteSize(0))
    """Resident host memory of Python and the libraries of a run on CPU: minimum and maximum; 0 for a GPU."""
    overhead_source: str
    """Source of workspaces, context and libraries."""
    calibrated: bool
    """True if workspaces and context were measured on such a device."""
    compute_capability: tuple[int, int] | None
    """CUDA compute capability, e.g. (8, 6); None on CPU."""
    compute_capability_source: str
    device_type: Literal["cuda", "cpu"] = "cuda"
    is_assumed: bool = False
    """True if no device was named and these facts are an assumption."""
    memory_bytes_per_second: int | None = Field(default=None, gt=0)
    """Memory bandwidth by the data sheet; None if unknown."""
    memory_speed_source: str | None = None
    measured_speed: MeasuredSpeeds | None = None
    """Speeds of ``peftbench calibrate``; None if it did not measure this device."""

    @field_validator("memory", mode="before")
    @classmethod
    def _expand_single_size(cls, value: object) -> object:
        return value if isinstance(value, (list, tuple)) else (value, value)

    @property
    def speeds(self) -> DeviceSpeeds | None:
        """Return the time of each operation: measured, else by the data sheet; None if neither is known."""
        if self.measured_speed is not None:
            return self.measured_speed
        if self.memory_bytes_per_second is None:
            return None
        return DataSheetSpeeds(self.torch_name, self.memory_bytes_per_second)

    @property
    def least_memory(self) -> int:
        """The smallest total memory that torch may report, in bytes; 0 if unknown."""
        return int(self.memory[0])

    @property
    def capability(self) -> DeviceCapability:
        """The device's native arithmetic. A CPU is planned in float32, since only that is modeled."""
        if self.compute_capability is None:
            return DeviceCapability("cpu", is_planned=True)
        return DeviceCapability.from_compute_capability(
            self.compute_capability, is_planned=True, is_assumed=self.is_assumed
        )


UNKNOWN_DEVICE = DeviceFacts(
    torch_name="a GPU",
    memory=(ByteSize(0), ByteSize(0)),
    memory_source="--budget",
    workspaces=(ByteSize(8 << 20), ByteSize(64 << 20)),
    context=(ByteSize(300 << 20), ByteSize(1434 << 20)),
    overhead_source="the smallest and the largest known values of other devices",
    calibrated=False,
    compute_capability=(8, 0),
    compute_capability_source="an assumption: bf16 and flash attention need it",
    is_assumed=True,
)
"""A device without a profile; it is assumed to support bf16."""


@cache
def load_devices() -> dict[str, DeviceFacts]:
    """Return all device profiles by file name."""
    return load_json_resources(__package__, DeviceFacts)


def get_device_facts(name: str) -> DeviceFacts:
    """Return the profile called ``name``, or the one in the file ``name`` if it ends with .json.

    Raises:
        DeviceError: there is no such profile, and the message suggests the nearest name; or the file is not a profile.
    """
    if name.endswith(".json"):
        return read_device_file(Path(name))
    if name not in load_devices():
        raise DeviceError(
            f"Unknown device {name!r}",
            f"{did_you_mean(name, load_devices())}; for another device, omit --device and pass its memory, "
            "e.g. --budget 16GiB",
        )
    return load_devices()[name]


def read_device_file(path: Path) -> DeviceFacts:
    """Return the profile in a file that ``peftbench calibrate`` wrote.

    Raises:
        DeviceError: the file does not exist, or it is not a profile.
    """
    try:
        return DeviceFacts.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DeviceError(
            f"--device {path} cannot be read ({error.strerror}); write it with peftbench calibrate --out {path}"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DeviceError(
            f"--device {path} is not a device file: {key}: {first['msg']}; "
            f"write it with peftbench calibrate --out {path}"
        ) from error


def get_facts_by_torch_name(torch_name: str, compute_capability: tuple[int, int] | None = None) -> DeviceFacts:
    """Return the profile with this torch name, or UNKNOWN_DEVICE with the compute capability, if that is known."""
    for facts in load_devices().values():
        if facts.torch_name == torch_name:
            return facts
    if compute_capability is None:
        return UNKNOWN_DEVICE
    return UNKNOWN_DEVICE.model_copy(
        update={
            "compute_capability": compute_capability,
            "compute_capability_source": "torch.cuda.get_device_capability",
            "is_assumed": False,
        }
    )
