"""The folder of a base model: finds a missing model and unreadable files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from peftbench.common.units import format_bytes
from peftbench.errors import ModelNotFoundError
from peftbench.record import RECORD_FILE

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
_LFS_POINTER_START = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES = 1024
"""Pointers are smaller than this (git-lfs, docs/spec.md)."""
_TOKENIZER_PATTERNS = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "*.model")
DOWNLOAD_HINT = "download or copy it again"
FOLDER_CONTENT = "config.json, model.safetensors and tokenizer files"


def check_model_folder(path: str, key: str = "model.path") -> None:
    """Check that ``path``, the value of ``key``, is not a file; if it is a folder, that it has a base model's config.

    Raises:
        ModelNotFoundError: it is a file, or a folder without a readable config of a base model; the message names
            its content and what to do.
    """
    folder = Path(path)
    if folder.is_file():
        raise ModelNotFoundError(
            f"{key}={path} is a file", f"set {key} to the folder that contains the model ({FOLDER_CONTENT})"
        )
    if not folder.is_dir():  # missing, or the name of a model on the Hub
        return
    names = sorted(os.listdir(_check_readable(folder)))  # noqa: PTH208 — names are enough
    if not names:
        raise ModelNotFoundError(f"the folder {path} is empty", f"put {FOLDER_CONTENT} there")
    if ADAPTER_CONFIG_FILE in names:
        raise _build_adapter_error(folder, key)
    if CONFIG_FILE not in names:
        raise ModelNotFoundError(f"the folder {path} has no {CONFIG_FILE}", _suggest_folder(folder, names, key))
    if fault := find_file_fault(folder / CONFIG_FILE):
        raise ModelNotFoundError(fault[0], fault[1])


def check_tokenizer_folder(path: str) -> None:
    """Check that ``path``, the value of ``model.tokenizer``, is not a file.

    Raises:
        ModelNotFoundError: it is a file.
    """
    if Path(path).is_file():
        raise ModelNotFoundError(
            f"model.tokenizer={path} is a file", "set model.tokenizer to the folder that contains the tokenizer files"
        )


def find_tokenizer_fault(path: str) -> tuple[str, str] | None:
    """Return what is wrong with a file of the tokenizer in a folder, and what to do; None if no fault is found."""
    files = {file for pattern in _TOKENIZER_PATTERNS for file in Path(path).glob(pattern)}
    return next((fault for file in sorted(files) if (fault := find_file_fault(file))), None)


def find_file_fault(file: Path) -> tuple[str, str] | None:
    """Return what is wrong with a file of a model, and what to do; None if it can be read.

    A file whose name ends in ``.json`` must have a JSON object.
    """
    try:
        if fault := find_pointer_fault(file):
            return fault
        problem = _find_json_problem(file) if file.suffix == ".json" else None
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    return (f"{file} {problem}", DOWNLOAD_HINT) if problem else None


def _find_json_problem(file: Path) -> str | None:
    """Return why a file is not a JSON object, as a predicate; None if it is one.

    Raises:
        OSError: it cannot be read.
    """
    data = file.read_bytes()
    try:
        content = json.loads(data)
    except RecursionError:
        return "is not valid JSON: it is nested too deeply"
    except ValueError as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "it is not UTF-8 text"
        return f"is not valid JSON: {reason}" if data else "is an empty file"
    return None if isinstance(content, dict) else f"has a JSON {_name_json_type(content)}, but must have an object"


def find_pointer_fault(file: Path) -> tuple[str, str] | None:
    """Return that a file is a git-lfs pointer, and the command that fetches the file; None if it is not.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        start = stream.read(_MAX_POINTER_BYTES)
    if not start.startswith(_LFS_POINTER_START):
        return None
    match = re.search(rb"^size (\d+)$", start, re.MULTILINE)
    size = f" for {format_bytes(int(match.group(1)))}" if match else ""
    return f"{file} is a git-lfs pointer{size}, not the file itself", f"run `git lfs pull` in {file.parent}"


def read_config_file(path: str) -> dict[str, Any]:
    """Return the content of a folder's config.json; empty without a readable one, or for a model of the Hub."""
    file = Path(path) / CONFIG_FILE
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_readable(folder: Path) -> Path:
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ModelNotFoundError(f"the folder {folder} cannot be read: Permission denied", "change its permissions")
    return folder


def _build_adapter_error(folder: Path, key: str) -> ModelNotFoundError:
    try:
        base = json.loads((folder / ADAPTER_CONFIG_FILE).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    hint = f"set {key}={base}, the adapter's base model" if base else f"set {key} to the adapter's base model"
    if (folder.parent / RECORD_FILE).is_file():
        hint += f", or {key}={folder.parent}, the run, to start from both merged"
    return ModelNotFoundError(
        f"the folder {folder} has an adapter ({ADAPTER_CONFIG_FILE}), and peftbench starts from base models", hint
    )


def _suggest_folder(folder: Path, names: list[str], key: str) -> str:
    """Return what to do about a folder without config.json: use a subfolder that has one, else add the files."""
    inner = sorted([*folder.glob(f"*/{CONFIG_FILE}"), *folder.glob(f"snapshots/*/{CONFIG_FILE}")])
    if inner:
        return f"set {key}={inner[0].parent}, which has one"
    if gguf := next((name for name in names if name.lower().endswith(".gguf")), None):
        return f"set {key}={folder / gguf}, the GGUF file in it"
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"it has {listed}; set {key} to the folder of a model ({FOLDER_CONTENT})"


def _name_json_type(content: object) -> str:
    if isinstance(content, list):
        return "array"
    return {str: "string", bool: "boolean", type(None): "null"}.get(type(content), "number")
