"""Requests for GPUs in sbatch(1) options: which options are one, and how many GPUs each node gets."""

from __future__ import annotations

import re
from collections.abc import Mapping

from peftbench.errors import SlurmError

GPUS_PER_NODE = "gpus-per-node"
_COUNT_OPTIONS = (GPUS_PER_NODE, "gpus", "gpus-per-task", "gpus-per-socket")
"""Options whose whole value is ``[type:]number[,...]``."""
_LIST_OPTIONS = ("gres", "tres-per-task")
"""Options whose value may list other resources too."""
_SHARED_GPU_NAMES = frozenset({"mps", "shard"})
"""Generic resources that are a part of one GPU."""
_EXAMPLES = {"gres": "gpu:a100:1", "tres-per-task": "gres/gpu:a100:1"}
_TYPE_PATTERN = re.compile(r"(?!\d+$)[A-Za-z0-9_][A-Za-z0-9_.+-]*")


def find_gpu_options(options: Mapping[str, str | None]) -> list[str]:
    """Return the names of the options that request GPUs; ``gres=tmp:100G`` requests none."""
    return [
        name
        for name, value in options.items()
        if name in _COUNT_OPTIONS or (name in _LIST_OPTIONS and any(map(_get_gpu_part, _split(value))))
    ]


def take_gpu_request(
    options: Mapping[str, str | None], nodes: int, default: int
) -> tuple[dict[str, str | None], str, int]:
    """Return the other options, the value of ``--gpus-per-node`` (empty for none), and the GPUs of each node.

    A request by another option stays among the options, so that the script has one line with it. ``default`` is the
    number of GPUs per node without a request.

    Raises:
        SlurmError: several options request GPUs, or the number per node cannot be derived.
    """
    names = find_gpu_options(options)
    if not names:
        return dict(options), str(default or ""), default
    if len(names) > 1:
        listed = " and ".join(f"slurm.{name}={options[name]}" for name in names)
        raise SlurmError(f"{listed} both request GPUs; give one of them")
    (name,) = names
    count = _count_per_node(name, options, nodes)
    others = {other: value for other, value in options.items() if other != name}
    if name == GPUS_PER_NODE:
        return others, str(options[name]) if count else "", count
    has_other_resources = not all(map(_get_gpu_part, _split(options[name]))) if name in _LIST_OPTIONS else False
    return (dict(options) if count or has_other_resources else others), "", count


def _count_per_node(name: str, options: Mapping[str, str | None], nodes: int) -> int:
    """Return the GPUs per node; each node has one task."""
    value, parts = options[name], _split(options[name])
    if name in _LIST_OPTIONS:
        parts = [part for part in map(_get_gpu_part, parts) if part]
    try:
        count = sum(map(_parse_count, parts))
    except ValueError:
        example = _EXAMPLES.get(name, "a100:1")
        raise SlurmError(
            f"slurm.{name}={value} is not a number of GPUs; write [TYPE:]NUMBER, e.g. slurm.{name}={example}"
        ) from None
    if name == "gpus" and nodes > 1:
        raise SlurmError(f"slurm.gpus={value} may be divided unevenly over {nodes} nodes; give --gpus-per-node instead")
    if name == "gpus-per-socket":
        sockets = options.get("sockets-per-node")
        if sockets is None or not sockets.isdigit():
            raise SlurmError(
                f"slurm.gpus-per-socket={value} needs slurm.sockets-per-node; give it, or --gpus-per-node instead"
            )
        count *= int(sockets)
    return count


def _split(value: str | None) -> list[str]:
    return (value or "").split(",")


def _get_gpu_part(resource: str) -> str | None:
    """Return type and number of a resource that is a GPU ("1" by default), None for another resource."""
    name, _, amount = re.sub(r"^gres[:/]", "", resource.strip()).replace("=", ":").partition(":")
    if name in _SHARED_GPU_NAMES:
        return "1"
    return (amount or "1") if name == "gpu" else None


def _parse_count(part: str) -> int:
    """Return the number in ``[type:]number``; a type alone is one GPU.

    Raises:
        ValueError: the text is neither.
    """
    kind, colon, number = part.strip().rpartition(":")
    if re.fullmatch(r"[0-9]{1,6}", number) and (not colon or _TYPE_PATTERN.fullmatch(kind)):
        return int(number)
    if not colon and _TYPE_PATTERN.fullmatch(number):
        return 1
    raise ValueError(part)
