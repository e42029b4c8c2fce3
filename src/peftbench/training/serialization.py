"""Nested state as safetensors and JSON: what a pickle would hold, without anything that could be executed on reading.

A tree is made of dictionaries (keys: text or whole numbers), lists, tuples, tensors, numbers, text, switches and None.
Tensors that share their memory are written once and share it again when read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TENSORS_FILE, STRUCTURE_FILE = "tensors.safetensors", "skeleton.json"
_SCALAR_TYPES = (str, int, float, bool, type(None))


def save_tree(tree: object, directory: Path) -> None:
    """Write ``tree`` to the new folder ``folder``.

    Raises:
        TypeError: something in it is none of what a tree is made of.
        OSError, SafetensorError: it cannot be written.
    """
    directory.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    skeleton = _flatten_tree(tree, tensors, {})
    save_file(tensors, directory / TENSORS_FILE)
    (directory / STRUCTURE_FILE).write_text(json.dumps(skeleton), encoding="utf-8")


def load_tree(directory: Path, device: torch.device, device_keys: tuple[str, ...] = ()) -> Any:  # noqa: ANN401 — whatever was written
    """The tree in ``folder``, on the CPU; below the keys ``moved``, what lay on another device comes to ``device``.

    Raises:
        OSError, SafetensorError, ValueError: it is not there or not whole.
    """
    tensors = load_file(directory / TENSORS_FILE)
    skeleton = json.loads((directory / STRUCTURE_FILE).read_text(encoding="utf-8"))
    cpu = torch.device("cpu")
    if isinstance(skeleton, dict) and "dict" in skeleton:
        at: dict[str, torch.Tensor] = {}
        here: dict[str, torch.Tensor] = {}
        return {
            key: _unflatten_tree(
                below, tensors, at if key in device_keys else here, device if key in device_keys else cpu
            )
            for key, below in skeleton["dict"]
        }
    return _unflatten_tree(skeleton, tensors, {}, cpu)


def _flatten_tree(value: object, tensors: dict[str, torch.Tensor], seen: dict[tuple[object, ...], str]) -> object:
    if isinstance(value, torch.Tensor):
        found = value.detach()
        key = (found.data_ptr(), tuple(found.shape), found.stride(), found.dtype)
        name = seen.get(key) if found.numel() else None
        if name is None:
            name = seen[key] = str(len(tensors))
            # A copy, since safetensors refuses tensors that overlap.
            tensors[name] = found.to("cpu", copy=True).contiguous()
        return {"tensor": name, "on_cpu": value.device.type == "cpu"}
    if isinstance(value, dict):
        if unfit := [key for key in value if not isinstance(key, (str, int))]:
            raise TypeError(f"a key of a state is a {type(unfit[0]).__name__}")
        return {"dict": [[key, _flatten_tree(below, tensors, seen)] for key, below in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_flatten_tree(below, tensors, seen) for below in value]}
    if isinstance(value, _SCALAR_TYPES):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be part of a state")


def _unflatten_tree(
    value: Any, tensors: dict[str, torch.Tensor], placed: dict[str, torch.Tensor], device: torch.device
) -> Any:  # noqa: ANN401
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        name = value["tensor"]
        if name not in placed:
            placed[name] = tensors[name] if value["on_cpu"] else tensors[name].to(device)
        return placed[name]
    (kind, below), *_ = value.items()
    if kind == "dict":
        return {key: _unflatten_tree(item, tensors, placed, device) for key, item in below}
    items = [_unflatten_tree(item, tensors, placed, device) for item in below]
    return items if kind == "list" else tuple(items)
