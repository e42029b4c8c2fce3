"""What only a device knows: one file each, of memory, the driver's context and the libraries' workspaces."""

from __future__ import annotations

from functools import cache
from typing import Literal

from pydantic import BaseModel, ByteSize, ConfigDict

from peftbench.common.filesystem import load_json_resources
from peftbench.errors import DeviceError, did_you_mean


class DeviceFacts(BaseModel):
    """What is beside tensors on one kind of GPU. Ranges are what is known where nothing was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    torch_name: str
    """As torch.cuda.get_device_name says it."""
    memory: ByteSize
    """What torch says it has."""
    memory_source: str
    workspaces: tuple[ByteSize, ByteSize]
    """Of cuBLAS and its kin, outside of what tensors take: at least and at most."""
    context: tuple[ByteSize, ByteSize]
    """Of the driver and of kernels that are loaded when they are first needed."""
    calibrated: bool
    """Whether workspaces and context were measured on such a device."""
    bf16: bool
    """Whether it has bf16 arithmetic."""
    device_type: Literal["cuda", "cpu"] = "cuda"


UNKNOWN_DEVICE = DeviceFacts(
    torch_name="a GPU",
    memory=ByteSize(0),
    memory_source="--budget",
    workspaces=(ByteSize(8 << 20), ByteSize(64 << 20)),
    context=(ByteSize(300 << 20), ByteSize(1434 << 20)),
    calibrated=False,
    bf16=True,
)
"""A device of which nothing is known but its memory."""


@cache
def load_devices() -> dict[str, DeviceFacts]:
    """All that have a file, by its name."""
    return load_json_resources(__package__, DeviceFacts)


def get_device_facts(name: str) -> DeviceFacts:
    """The facts of the device of that name.

    Raises:
        DeviceError: there is no file for it; names the nearest.
    """
    if name not in load_devices():
        raise DeviceError(
            f"no device is called {name!r} here; give --budget with its memory instead, as --budget 16GiB",
            did_you_mean(name, load_devices()) or f"known: {', '.join(load_devices())}",
        )
    return load_devices()[name]


def get_facts_by_torch_name(torch_name: str) -> DeviceFacts:
    """The facts of the device that torch calls so, or what is known of any."""
    return next((facts for facts in load_devices().values() if facts.torch_name == torch_name), UNKNOWN_DEVICE)
