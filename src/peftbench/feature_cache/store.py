"""Disk store of hidden states at selected positions of each training example.

A folder with three files: ``features``, the rows of all examples in order; ``completed``, one byte per example, 1 once
its rows are written; and ``metadata.json``, the cache key and layout. An empty file ``durable`` marks a store that was
flushed to disk. Processes of one machine share the store: each maps the files and writes different examples. The
folder's name is a hash of the cache key, so anything that changes the states leads to another folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock

from peftbench.common.filesystem import CACHE_DIR_ENV, cache_dir, write_atomically, write_error
from peftbench.common.units import format_bytes
from peftbench.data.cache_usage import FEATURES_FOLDER
from peftbench.errors import DiskFullError, OutputError

PositionKind = Literal["labeled", "real"]
"""The positions of an example that are stored: those that predict a label, or all of its tokens."""
StorageDtype = Literal["fp32", "bf16"]
STORAGE_DTYPES: dict[StorageDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FORMAT_VERSION = 3  # part of the folder name: raise it when the files or the cache key change
_FEATURES_FILE, _COMPLETED_FILE, _METADATA_FILE, _DURABLE_FILE = (
    "features",
    "completed",
    "metadata.json",
    "durable",
)
_MADV_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class StoreLayout:
    """Position of each example's rows in the store."""

    row_counts: torch.Tensor
    """Stored positions per example, int64."""
    hidden_size: int
    """Width of a hidden state."""
    dtype: StorageDtype
    position_kind: PositionKind = "labeled"
    offsets: torch.Tensor = field(init=False)
    """First row of each example, followed by the total number of rows."""

    def __post_init__(self) -> None:
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), self.row_counts.cumsum(0)))
        object.__setattr__(self, "offsets", offsets)

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return len(self.row_counts)

    @property
    def num_positions(self) -> int:
        """Number of rows of all examples."""
        return int(self.offsets[-1])

    @property
    def nbytes(self) -> int:
        """Size of the features file in bytes."""
        return self.num_positions * self.hidden_size * STORAGE_DTYPES[self.dtype].itemsize

    def rows(self, example: int) -> slice:
        """Return the rows of one example."""
        return slice(int(self.offsets[example]), int(self.offsets[example + 1]))


class FeatureStore:
    """An open store; its files must be complete and of the right size."""

    def __init__(self, directory: Path, layout: StoreLayout) -> None:
        self.directory, self.layout = directory, layout
        self._features_mmap, features = _map_file(directory / _FEATURES_FILE, STORAGE_DTYPES[layout.dtype])
        self._features = features.view(layout.num_positions, layout.hidden_size)
        self._completed_mmap, self._completed = _map_file(directory / _COMPLETED_FILE, torch.uint8)

    @property
    def nbytes(self) -> int:
        """Size of the features file in bytes."""
        return self.layout.nbytes

    def completed_mask(self) -> torch.Tensor:
        """Return a copy of the mask of stored examples, bool; later writes do not change it."""
        return self._completed.bool()

    def write(self, examples: Sequence[int], features: torch.Tensor) -> None:
        """Store ``features`` (rows of all ``examples`` in order, width), rounded to the stored dtype.

        Examples that are already stored are not overwritten: another process may be reading them.
        """
        counts = self.layout.row_counts[list(examples)].tolist()
        if sum(counts) != len(features):
            raise ValueError(f"got {len(features)} hidden states for the {sum(counts)} positions of these examples")
        parts = features.detach().to(STORAGE_DTYPES[self.layout.dtype]).cpu().split(counts)
        for example, part in zip(examples, parts, strict=True):
            if not self._completed[example]:
                self._features[self.layout.rows(example)] = part
                # Set after the rows: a process killed in between leaves the example marked as missing.
                self._completed[example] = 1
        self._release_pages()

    def read(self, examples: Sequence[int], *, pin_memory: bool = False) -> torch.Tensor:
        """Return the rows of all ``examples`` in order: (rows, width) in the stored dtype, optionally pinned.

        Raises:
            KeyError: an example is not stored.
        """
        if missing := [example for example in examples if not self._completed[example]]:
            raise KeyError(f"hidden states of example {missing[0]} are not in {self.directory}")
        slices = [self.layout.rows(example) for example in examples]
        total = sum(rows.stop - rows.start for rows in slices)
        features = torch.empty((total, self.layout.hidden_size), dtype=self._features.dtype, pin_memory=pin_memory)
        torch.cat([self._features[rows] for rows in slices], out=features)
        self._release_pages()
        return features

    def mark_durable(self) -> None:
        """Flush a complete store to disk and mark it, so that it stays valid after a crash of the machine.

        If flushing fails, the store stays valid until the next reboot.
        """
        marker = self.directory / _DURABLE_FILE
        if marker.exists() or not bool(self._completed.all()):
            return
        with contextlib.suppress(OSError, OutputError):
            self._features_mmap.flush()
            self._completed_mmap.flush()
            write_atomically(marker, "")

    def _release_pages(self) -> None:
        """Release touched pages (they stay in the page cache), so that they do not count in this process's peak RSS."""
        if _MADV_DONTNEED is not None:
            self._features_mmap.madvise(_MADV_DONTNEED)


def _map_file(path: Path, dtype: torch.dtype) -> tuple[mmap.mmap, torch.Tensor]:
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    return mapped, torch.frombuffer(mapped, dtype=dtype)


def hash_cache_key(cache_key: Mapping[str, Any]) -> str:
    """Return the store's folder name: a hash of the cache key, whose values must be JSON-serializable."""
    content = json.dumps([_FORMAT_VERSION, dict(cache_key)], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def get_store_dir(cache_key: Mapping[str, Any]) -> Path:
    """Return the store's folder in the user's cache."""
    return cache_dir() / FEATURES_FOLDER / hash_cache_key(cache_key)


def open_store(cache_key: Mapping[str, Any], layout: StoreLayout, log: Callable[[str], None]) -> FeatureStore:
    """Open the store of ``cache_key``; create it if it does not exist or is damaged.

    ``log`` receives a message with the store's size before it is created.

    Raises:
        DiskFullError: the disk has too little free space; nothing is created.
        OutputError: the folder is not writable.
    """
    folder = get_store_dir(cache_key)
    metadata = {
        "format_version": _FORMAT_VERSION,
        "cache_key": dict(cache_key),
        "num_examples": layout.num_examples,
        "num_positions": layout.num_positions,
        "position_kind": layout.position_kind,
        "hidden_size": layout.hidden_size,
        "dtype": layout.dtype,
    }
    try:
        if not _is_valid_store(folder, layout, metadata):
            _check_disk_space(folder, layout)  # before any folder is created
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f"{folder.name}.lock")):
                if not _is_valid_store(folder, layout, metadata):  # another process may have created it meanwhile
                    shutil.rmtree(folder, ignore_errors=True)
                    log(describe_store(layout, folder))
                    _create_store(folder, layout, metadata)
        return FeatureStore(folder, layout)
    except OSError as error:
        raise write_error(folder, error) from error


def describe_store(layout: StoreLayout, directory: Path) -> str:
    """Return a sentence with the store's size and folder."""
    return (
        f"hidden states of {layout.num_positions:,} {layout.position_kind} positions take "
        f"{format_bytes(layout.nbytes)} in {directory}"
    )


def _is_valid_store(directory: Path, layout: StoreLayout, metadata: dict[str, Any]) -> bool:
    """True if all files exist, have the right sizes, and the metadata matches."""
    try:
        saved = json.loads((directory / _METADATA_FILE).read_text(encoding="utf-8"))
        flags = (directory / _COMPLETED_FILE).read_bytes()
        size = (directory / _FEATURES_FILE).stat().st_size
    except (OSError, ValueError):
        return False
    # After a crash of the machine, flags may be on disk while their rows are not.
    boot_id = saved.pop("boot_id", None)
    trusted = (directory / _DURABLE_FILE).exists() or boot_id == _read_boot_id()
    sizes_match = (size, len(flags)) == (layout.nbytes, layout.num_examples)
    return trusted and sizes_match and saved == metadata and max(flags, default=0) <= 1


def _check_disk_space(directory: Path, layout: StoreLayout) -> None:
    existing = next(parent for parent in directory.parents if parent.exists())
    reclaimed = sum(path.stat().st_blocks * 512 for path in directory.glob("*"))  # e.g. a damaged store
    free, needed = shutil.disk_usage(existing).free + reclaimed, layout.nbytes + layout.num_examples
    if free < needed:
        raise DiskFullError(
            f"{describe_store(layout, directory)}, but its disk has {format_bytes(free)} free; free some space, set "
            f"{CACHE_DIR_ENV} to a folder on a larger disk, or set train.feature_cache to "
            + ("bf16, which takes half, or null" if layout.dtype == "fp32" else "null")
        )


def _create_store(directory: Path, layout: StoreLayout, metadata: dict[str, Any]) -> None:
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process: this one holds the lock
    try:
        unfinished.mkdir()
        _allocate(unfinished / _FEATURES_FILE, layout.nbytes)
        _allocate(unfinished / _COMPLETED_FILE, layout.num_examples)
        write_atomically(
            unfinished / _METADATA_FILE, json.dumps(metadata | {"boot_id": _read_boot_id()}, indent=1) + "\n"
        )
        unfinished.rename(directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _allocate(path: Path, size: int) -> None:
    """Create a zero-filled file with its disk space reserved: a write through mmap cannot report a full disk."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            for start in range(0, size, _BLOCK_BYTES):
                file.write(bytes(min(_BLOCK_BYTES, size - start)))


def _read_boot_id() -> str | None:
    """Return the id of the machine's current boot, None if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
