"""A store of hidden states on disk: what a frozen trunk gave for the labelled positions of each training example.

A folder with three files: ``states``, the rows of all examples one after another; ``complete``, one byte for each
example, 1 once its rows are written; and ``trunk.json``, what they are of. Several processes of one machine share it:
each maps the files, and writes other examples. The name is a fingerprint of all that the states depend on, so whatever
changes them finds another folder.
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
from peftbench.errors import DiskFullError, OutputError

StorageDtype = Literal["fp32", "bf16"]
STORAGE_DTYPES: dict[StorageDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FORMAT_VERSION = 1  # part of the name: raise it when what lies in the files changes
_FEATURES_FILE, _COMPLETED_FILE, _METADATA_FILE, _DURABLE_FILE = "states", "complete", "trunk.json", "sealed"
_MADV_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class StoreLayout:
    """Where the rows of each example lie."""

    label_counts: torch.Tensor
    """Labelled positions of each example, int64."""
    hidden_size: int
    """Of a hidden state."""
    dtype: StorageDtype
    offsets: torch.Tensor = field(init=False)
    """First row of each example, and behind the last one the number of all rows."""

    def __post_init__(self) -> None:
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), self.label_counts.cumsum(0)))
        object.__setattr__(self, "offsets", offsets)

    @property
    def num_examples(self) -> int:
        """How many there are."""
        return len(self.label_counts)

    @property
    def num_positions(self) -> int:
        """Rows of all of them."""
        return int(self.offsets[-1])

    @property
    def nbytes(self) -> int:
        """Size of the file of rows."""
        return self.num_positions * self.hidden_size * STORAGE_DTYPES[self.dtype].itemsize

    def rows(self, example: int) -> slice:
        """Those of one example."""
        return slice(int(self.offsets[example]), int(self.offsets[example + 1]))


class FeatureStore:
    """An opened store; its files are whole and of the right size when it is made."""

    def __init__(self, directory: Path, layout: StoreLayout) -> None:
        self.directory, self.layout = directory, layout
        self._features_mmap, states = _map_file(directory / _FEATURES_FILE, STORAGE_DTYPES[layout.dtype])
        self._features = states.view(layout.num_positions, layout.hidden_size)
        self._completed_mmap, self._completed = _map_file(directory / _COMPLETED_FILE, torch.uint8)

    @property
    def nbytes(self) -> int:
        """Of the file of rows."""
        return self.layout.nbytes

    def completed_mask(self) -> torch.Tensor:
        """Which examples are there, bool: a copy, which what is written later does not change."""
        return self._completed.bool()

    def write(self, examples: Sequence[int], features: torch.Tensor) -> None:
        """Keep ``states`` (rows of all ``examples`` in their order, width), rounded to the stored type.

        What is there already stays: another process may be reading it.
        """
        counts = self.layout.label_counts[list(examples)].tolist()
        if sum(counts) != len(features):
            raise ValueError(f"{len(features)} states for the {sum(counts)} labelled positions of these examples")
        parts = features.detach().to(STORAGE_DTYPES[self.layout.dtype]).cpu().split(counts)
        for example, part in zip(examples, parts, strict=True):
            if not self._completed[example]:
                self._features[self.layout.rows(example)] = part
                self._completed[example] = (
                    1  # not before: whoever is killed in between leaves an example that is not there
                )
        self._release_pages()

    def read(self, examples: Sequence[int], *, pin_memory: bool = False) -> torch.Tensor:
        """Rows of all ``examples`` in their order, (rows, width) in the stored type, in page-locked memory if asked.

        Raises:
            KeyError: one is not there.
        """
        if missing := [example for example in examples if not self._completed[example]]:
            raise KeyError(f"hidden states of example {missing[0]} are not in {self.directory}")
        places = [self.layout.rows(example) for example in examples]
        total = sum(place.stop - place.start for place in places)
        made = torch.empty((total, self.layout.hidden_size), dtype=self._features.dtype, pin_memory=pin_memory)
        torch.cat([self._features[place] for place in places], out=made)
        self._release_pages()
        return made

    def mark_durable(self) -> None:
        """Have the system write all to the disk, where all is there: then it is good after a crash of the machine too.

        Where that fails, it is good until then.
        """
        sealed = self.directory / _DURABLE_FILE
        if sealed.exists() or not bool(self._completed.all()):
            return
        with contextlib.suppress(OSError, OutputError):
            self._features_mmap.flush()
            self._completed_mmap.flush()
            write_atomically(sealed, "")

    def _release_pages(self) -> None:
        """Take what was touched out of this process's memory (not of the system's cache), or its peak would hold it."""
        if _MADV_DONTNEED is not None:
            self._features_mmap.madvise(_MADV_DONTNEED)


def _map_file(path: Path, dtype: torch.dtype) -> tuple[mmap.mmap, torch.Tensor]:
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    return mapped, torch.frombuffer(mapped, dtype=dtype)


def hash_cache_key(cache_key: Mapping[str, Any]) -> str:
    """The name of the store of what ``of`` describes (values that JSON knows)."""
    described = json.dumps([_FORMAT_VERSION, dict(cache_key)], sort_keys=True)
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def get_store_dir(cache_key: Mapping[str, Any]) -> Path:
    """The folder of that store, in the user's cache."""
    return cache_dir() / "trunk" / hash_cache_key(cache_key)


def open_store(cache_key: Mapping[str, Any], layout: StoreLayout, log: Callable[[str], None]) -> FeatureStore:
    """The store of what ``of`` describes, made where it is not there or is damaged.

    ``announce`` is told its size before it is made.

    Raises:
        DiskFullError: the disk has less room; nothing is left behind.
        OutputError: it cannot be written there.
    """
    folder = get_store_dir(cache_key)
    wanted = {
        "format": _FORMAT_VERSION,
        "of": dict(cache_key),
        "examples": layout.num_examples,
        "positions": layout.num_positions,
        "width": layout.hidden_size,
        "stored": layout.dtype,
    }
    try:
        if not _is_valid_store(folder, layout, wanted):
            _check_disk_space(folder, layout)  # before a folder is made for it
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f"{folder.name}.lock")):
                if not _is_valid_store(folder, layout, wanted):  # another process may have made it meanwhile
                    shutil.rmtree(folder, ignore_errors=True)
                    log(describe_store(layout, folder))
                    _create_store(folder, layout, wanted)
        return FeatureStore(folder, layout)
    except OSError as error:
        raise write_error(folder, error) from error


def describe_store(layout: StoreLayout, directory: Path) -> str:
    """How large a store is, and where."""
    return (
        f"the hidden states of {layout.num_positions:,} labelled positions take {layout.nbytes:,} bytes in {directory}"
    )


def _is_valid_store(directory: Path, layout: StoreLayout, metadata: dict[str, Any]) -> bool:
    """Whether the files are there, as large as they must be, and of what was asked for."""
    try:
        meta = json.loads((directory / _METADATA_FILE).read_text(encoding="utf-8"))
        flags = (directory / _COMPLETED_FILE).read_bytes()
        size = (directory / _FEATURES_FILE).stat().st_size
    except (OSError, ValueError):
        return False
    # After a crash of the machine flags may be on the disk whose rows are not.
    trusted = (directory / _DURABLE_FILE).exists() or meta.pop("boot", None) == _read_boot_id()
    meta.pop("boot", None)
    sizes = (size, len(flags)) == (layout.nbytes, layout.num_examples)
    return trusted and sizes and meta == metadata and max(flags, default=0) <= 1


def _check_disk_space(directory: Path, layout: StoreLayout) -> None:
    there = next(place for place in directory.parents if place.exists())
    replaced = sum(path.stat().st_blocks * 512 for path in directory.glob("*"))  # a damaged one, say
    free, needed = shutil.disk_usage(there).free + replaced, layout.nbytes + layout.num_examples
    if free < needed:
        raise DiskFullError(
            f"{describe_store(layout, directory)}, and its disk has {free:,} free; make room, set {CACHE_DIR_ENV} to a folder "
            "on a larger disk, or train.feature_cache to "
            + ("bf16, which takes half, or null" if layout.dtype == "fp32" else "null")
        )


def _create_store(directory: Path, layout: StoreLayout, metadata: dict[str, Any]) -> None:
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed: the lock is ours
    try:
        unfinished.mkdir()
        _allocate(unfinished / _FEATURES_FILE, layout.nbytes)
        _allocate(unfinished / _COMPLETED_FILE, layout.num_examples)
        write_atomically(unfinished / _METADATA_FILE, json.dumps(metadata | {"boot": _read_boot_id()}, indent=1) + "\n")
        unfinished.rename(directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _allocate(path: Path, size: int) -> None:
    """A file of zeros that has all of its room on the disk: a write through a map has no way to say that it is full."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            for start in range(0, size, _BLOCK_BYTES):
                file.write(bytes(min(_BLOCK_BYTES, size - start)))


def _read_boot_id() -> str | None:
    """What names this start of the machine, None where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
