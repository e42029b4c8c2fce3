"""Save nested state as safetensors and JSON: like a pickle, but loading it executes no code.

A tree consists of dicts (keys: str or int), lists, tuples, tensors, numbers, strings, bools and None. Tensors that
share memory are written once and share memory again after loading.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TENSORS_FILE, STRUCTURE_FILE = "tensors.safetensors", "structure.json"
_SCALAR_TYPES = (str, int, float, bool, type(None))


def save_tree(tree: object, directory: Path) -> None:
    """Write ``tree`` to the new folder ``directory``.

    Raises:
        TypeError: the tree has a value of another type.
        OSError, SafetensorError: the folder is not writable.
    """
    directory.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    structure = _flatten_tree(tree, tensors, {})
    save_file(tensors, directory / TENSORS_FILE)
    (directory / STRUCTURE_FILE).write_text(json.dumps(structure), encoding="utf-8")


def load_tree(directory: Path, device: torch.device, device_keys: tuple[str, ...] = ()) -> Any:  # noqa: ANN401 — returns the type that was saved
    """Load a tree to the CPU; tensors under ``device_keys`` that were saved from another device go to ``device``.

    Raises:
        OSError, SafetensorError, ValueError: the files are missing or damaged.
    """
    tensors = load_file(directory / TENSORS_FILE)
    structure = json.loads((directory / STRUCTURE_FILE).read_text(encoding="utf-8"))
    cpu = torch.device("cpu")
    if isinstance(structure, dict) and "dict" in structure:
        on_device: dict[str, torch.Tensor] = {}
        on_cpu: dict[str, torch.Tensor] = {}
        return {
            key: _unflatten_tree(
                child, tensors, on_device if key in device_keys else on_cpu, device if key in device_keys else cpu
            )
            for key, child in structure["dict"]
        }
    return _unflatten_tree(structure, tensors, {}, cpu)


def _flatten_tree(value: object, tensors: dict[str, torch.Tensor], seen: dict[tuple[object, ...], str]) -> object:
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        name = seen.get(key) if tensor.numel() else None
        if name is None:
            name = seen[key] = str(len(tensors))
            # Copied because safetensors refuses tensors that overlap.
            tensors[name] = tensor.to("cpu", copy=True).contiguous()
        return {"tensor": name, "on_cpu": value.device.type == "cpu"}
    if isinstance(value, dict):
        if invalid := [key for key in value if not isinstance(key, (str, int))]:
            raise TypeError(f"a state has a key of type {type(invalid[0]).__name__}; only str and int can be saved")
        return {"dict": [[key, _flatten_tree(child, tensors, seen)] for key, child in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_flatten_tree(child, tensors, seen) for child in value]}
    if isinstance(value, _SCALAR_TYPES):
        return value
    raise TypeError(f"a state has a value of type {type(value).__name__}, which cannot be saved")


def _unflatten_tree(
    value: Any,  # noqa: ANN401 — parsed JSON
    tensors: dict[str, torch.Tensor],
    placed: dict[str, torch.Tensor],
    device: torch.device,
) -> Any:  # noqa: ANN401
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        name = value["tensor"]
        if name not in placed:
            placed[name] = tensors[name] if value["on_cpu"] else tensors[name].to(device)
        return placed[name]
    (kind, children), *_ = value.items()
    if kind == "dict":
        return {key: _unflatten_tree(item, tensors, placed, device) for key, item in children}
    items = [_unflatten_tree(item, tensors, placed, device) for item in children]
    return items if kind == "list" else tuple(items)
