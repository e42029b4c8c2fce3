"""The weight files in a model's folder: missing, in another format, truncated, or git-lfs pointers."""

from __future__ import annotations

import json
from pathlib import Path

from peftbench.common.text import first_line
from peftbench.errors import ModelNotFoundError
from peftbench.modeling.model_folder import DOWNLOAD_HINT, find_file_fault, find_pointer_fault

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLE_PATTERNS = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt")
_OTHER_PATTERNS = ("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.npz")
_MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format."""


def check_weight_files(path: str) -> None:
    """Check that a folder has the safetensors files of a model, and that each is complete.

    Only the headers are read. A path that is not a folder is not checked.

    Raises:
        ModelNotFoundError: the message names the file and what to do.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    if (folder / WEIGHTS_FILE).exists():  # transformers prefers it to shards
        files = [folder / WEIGHTS_FILE]
    elif (folder / INDEX_FILE).exists():
        files = _list_shards(folder / INDEX_FILE)
    else:
        raise _build_missing_error(folder)
    for file in files:
        if fault := _find_fault(file):
            raise ModelNotFoundError(*fault)
    generation_config = folder / "generation_config.json"  # loaded with the weights
    if generation_config.exists() and (fault := find_file_fault(generation_config)):
        raise ModelNotFoundError(*fault)


def _list_shards(index: Path) -> list[Path]:
    """Return the files that an index names.

    Raises:
        ModelNotFoundError: it is not an index, or a file is missing.
    """
    if fault := find_file_fault(index):
        raise ModelNotFoundError(*fault)
    weight_map = json.loads(index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelNotFoundError(f"{index} names no weight files (weight_map)", DOWNLOAD_HINT)
    shards = [index.parent / str(name) for name in sorted(set(map(str, weight_map.values())))]
    missing = [shard for shard in shards if not shard.exists()]
    if missing:
        listed = ", ".join(shard.name for shard in missing[:3]) + (" and more" if len(missing) > 3 else "")
        raise ModelNotFoundError(
            f"{len(missing)} of the {len(shards)} weight files that {index} names are missing: {listed}",
            f"download or copy {'it' if len(missing) == 1 else 'them'} to {index.parent}",
        )
    return shards


def _find_fault(file: Path) -> tuple[str, str] | None:
    """Return what is wrong with a safetensors file, and what to do; None if it is complete."""
    from safetensors import SafetensorError, safe_open

    if file.is_dir():
        return f"{file} is a folder, not a file of weights", "put the file there"
    try:
        if fault := find_pointer_fault(file):
            return fault
        with safe_open(str(file), "pt"):
            return None
    except OSError as error:
        problem = f"cannot be read: {error.strerror or first_line(error)}"
    except SafetensorError as error:
        problem = _describe_damage(file, error)
    return f"{file} {problem}", DOWNLOAD_HINT


def _describe_damage(file: Path, error: Exception) -> str:
    size, expected = file.stat().st_size, _read_expected_size(file)
    if not size:
        return "is an empty file"
    if expected is not None and size < expected:
        return f"is truncated: it has {size:,} of {expected:,} bytes"
    return f"is not a valid safetensors file: {first_line(error)}"


def _read_expected_size(file: Path) -> int | None:
    """Return the size of a safetensors file according to its header, None without a readable header."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _MAX_HEADER_BYTES:
            return None
        header = stream.read(length)
    if len(header) < length:
        return 8 + length
    try:
        entries = json.loads(header)
        end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        return 8 + length + int(end)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def _build_missing_error(folder: Path) -> ModelNotFoundError:
    """Return the error for a folder without safetensors files under the names of transformers."""
    safetensors = sorted(folder.glob("*.safetensors"))
    if safetensors:
        expected = INDEX_FILE if "-of-" in safetensors[0].name else WEIGHTS_FILE
        hint = f"rename it to {expected}" if len(safetensors) == 1 and expected == WEIGHTS_FILE else f"add {expected}"
        return ModelNotFoundError(f"the folder {folder} has {safetensors[0].name}, but no {expected}", hint)
    pickles = [file for pattern in _PICKLE_PATTERNS for file in sorted(folder.glob(pattern)) if "args" not in file.name]
    if pickles:
        if fault := find_pointer_fault(pickles[0]):
            return ModelNotFoundError(*fault)
        command = (
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
        return ModelNotFoundError(
            f"the folder {folder} has its weights in {pickles[0].name}, but peftbench reads safetensors only",
            f"convert them: {command}",
        )
    others = [file for pattern in _OTHER_PATTERNS for file in sorted(folder.glob(pattern))]
    if others and others[0].suffix == ".gguf":
        return ModelNotFoundError(
            f"the folder {folder} has its weights in {others[0].name}", f"set model.path={others[0]}, the GGUF file"
        )
    if others:
        return ModelNotFoundError(
            f"the folder {folder} has its weights in {others[0].name}, but peftbench reads safetensors only",
            "set model.path to a copy of the model in that format (model.safetensors)",
        )
    return ModelNotFoundError(
        f"the folder {folder} has no weights",
        f"put {WEIGHTS_FILE} there, or set model.init=random for random weights",
    )
