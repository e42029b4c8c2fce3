"""Write, select and read checkpoints: atomic folders; only the newest few are kept.

The main process selects the checkpoint to load. An error on one process is raised on all of them, so that none blocks
in a collective.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from peftbench.common.filesystem import as_os_error, write_error
from peftbench.common.fingerprint import hash_file
from peftbench.distributed.collectives import all_gather_objects, broadcast_from_main
from peftbench.errors import CheckpointError
from peftbench.record import SCHEMA_VERSION, read_schema_version
from peftbench.run_dir.layout import (
    CHECKPOINT_METADATA_FILE,
    PARTIAL_SUFFIX,
    RunDir,
    get_checkpoint_name,
    list_checkpoints,
)
from peftbench.training import serialization

if TYPE_CHECKING:
    from accelerate import Accelerator

PER_RANK_KEYS = ("rng_state", "probe", "measurements")
"""Parts of a state that differ between processes even if the model is replicated."""
_FORMAT_VERSION = 3  # raise it when the files or keys of a checkpoint change
_READ_ERRORS = (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError)
_WRITE_ERRORS = (OSError, SafetensorError, TypeError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class CheckpointMetadata:
    """Identifies the training that wrote a checkpoint, and the environment it ran in."""

    training_fingerprint: str
    """Hash of the recipe keys that change a trained weight."""
    measurement_fingerprint: str
    """Hash of those and of the keys that change a measurement of the training."""
    model_fingerprint: str
    """Fingerprint of the base model, and of its config if it is a local folder."""
    data_fingerprint: str
    """Fingerprint of the training split."""
    engine: str
    world_size: int
    device: str
    versions: dict[str, str]

    @property
    def training_id(self) -> str:
        """Hash of recipe, base model and data; names the folder of this training's checkpoints."""
        identity = json.dumps([self.training_fingerprint, self.model_fingerprint, self.data_fingerprint])
        return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()

    @property
    def replicated(self) -> bool:
        """True if each process holds the full state, so that any number of processes can resume from rank 0's files."""
        return self.engine in {"single", "ddp"}

    def incompatibilities(self, other: CheckpointMetadata) -> list[str]:
        """Return why this run cannot resume from a checkpoint written with ``other``; empty if it can."""
        differences = (
            []
            if self.replicated and other.replicated
            else [
                f"{name} {theirs} instead of {mine}"
                for name, mine, theirs in (
                    ("engine", self.engine, other.engine),
                    ("processes", self.world_size, other.world_size),
                )
                if mine != theirs
            ]
        )
        if self.device != other.device:
            differences.append(f"device {other.device} instead of {self.device}")
        return differences + [
            f"{name} {other.versions.get(name)} instead of {version}"
            for name, version in self.versions.items()
            if other.versions.get(name) != version
        ]


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint to resume from."""

    path: Path
    metadata: CheckpointMetadata


class CheckpointManager:
    """Manages the checkpoints of one run, in a separate folder for each recipe, base model and data."""

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        metadata: CheckpointMetadata,
        keep_latest: int | None,
        parent: Path | None = None,
    ) -> None:
        """Keep the newest ``keep_latest`` checkpoints (None: all) in ``parent``, by default the run's checkpoints."""
        self.accelerator, self.metadata, self.keep_latest = accelerator, metadata, keep_latest
        self.run_dir = RunDir(run_dir)
        self.directory = (parent or self.run_dir.checkpoints_dir) / metadata.training_id
        self.notes: list[str] = []

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write this process's part; once all are written, commit the checkpoint and delete the oldest ones.

        Raises:
            OutputError, DiskFullError: a process cannot write; all processes raise, and earlier checkpoints stay.
        """
        final = self.directory / get_checkpoint_name(step)
        unfinished = final.with_name(f"{final.name}{PARTIAL_SUFFIX}")
        rank = self.accelerator.process_index
        if self.metadata.replicated and rank > 0:  # rank 0 writes the rest
            state = {key: state[key] for key in PER_RANK_KEYS if key in state}

        def prepare() -> None:
            if self.accelerator.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)

        def commit() -> None:
            if self.accelerator.is_main_process:
                self._commit(step, unfinished, final)

        for action in (prepare, lambda: serialization.save_tree(state, unfinished / _rank_dir_name(rank)), commit):
            self._run_on_all_ranks(action, final, unfinished)

    def _run_on_all_ranks(self, fn: Callable[[], None], final_dir: Path, partial_dir: Path) -> None:
        problem: tuple[int | None, str] | None = None
        try:
            fn()
        except _WRITE_ERRORS as error:
            os_error = as_os_error(error)
            problem = os_error.errno, os_error.strerror or str(os_error)
        problems = [other for other in all_gather_objects(self.accelerator, problem) if other is not None]
        if problems:
            if self.accelerator.is_main_process:
                shutil.rmtree(partial_dir, ignore_errors=True)
            raise write_error(final_dir, OSError(*problems[0]))

    def _commit(self, step: int, partial_dir: Path, final_dir: Path) -> None:
        for rank in range(self.accelerator.num_processes):
            if not (partial_dir / _rank_dir_name(rank)).is_dir():
                raise OSError(None, f"the files of process {rank} are missing: all processes must share this folder")
        files = {str(path.relative_to(partial_dir)): _hash_file(path) for path in sorted(partial_dir.rglob("*.*"))}
        content = {
            "format_version": _FORMAT_VERSION,
            "step": step,
            "metadata": asdict(self.metadata),
            "files": files,
        }
        (partial_dir / CHECKPOINT_METADATA_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        for path in (*partial_dir.rglob("*"), partial_dir):
            _fsync(path)
        shutil.rmtree(final_dir, ignore_errors=True)
        partial_dir.rename(final_dir)
        _fsync(self.directory)
        if self.keep_latest is not None:
            for old in self.list_checkpoints()[self.keep_latest :]:
                shutil.rmtree(old, ignore_errors=True)

    def list_checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, newest first."""
        return list_checkpoints(self.directory)

    def find(self, step: int) -> CheckpointRef:
        """Return the checkpoint of ``step``. Collective.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        path = self.directory / get_checkpoint_name(step)

        def read() -> CheckpointRef:
            metadata = _read_valid_metadata(path)
            if metadata is None:
                raise CheckpointError(
                    f"{path}, with the weights of step {step}, is missing or damaged",
                    f"delete {self.run_dir.checkpoints_dir} to start over",
                )
            return CheckpointRef(path, metadata)

        return broadcast_from_main(self.accelerator, read)

    def latest(self) -> CheckpointRef | None:
        """Return the newest valid checkpoint of this run, None if it has none; damaged ones are noted and deleted.

        Raises:
            CheckpointError: the checkpoint has an old format, or another engine, number of processes, device or library
                version wrote it.
        """
        chosen: tuple[CheckpointRef | None, list[str], str | None] = (None, [], None)
        if self.accelerator.is_main_process:
            chosen = self._select_latest()
        if self.accelerator.num_processes > 1:
            (chosen,) = broadcast_object_list([chosen])
        checkpoint, notes, error_message = chosen
        self.notes += notes
        if error_message is not None:
            raise CheckpointError(error_message)
        return checkpoint

    def _select_latest(self) -> tuple[CheckpointRef | None, list[str], str | None]:
        others = sorted(path for path in self.directory.parent.glob("*") if path.is_dir() and path != self.directory)
        if error_message := self._find_old_format():
            return None, [], error_message
        notes = [f"{path} has checkpoints of another training (recipe, base model or data); kept" for path in others]
        for path in self.directory.glob(f"*{PARTIAL_SUFFIX}"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.list_checkpoints():
            metadata = _read_valid_metadata(path)
            if metadata is None:
                notes.append(f"the checkpoint {path.name} was damaged; deleted")
                shutil.rmtree(path, ignore_errors=True)
                continue
            if differences := self.metadata.incompatibilities(metadata):
                return (
                    None,
                    notes,
                    (
                        f"Cannot resume from {path}: it was written with {', '.join(differences)}; launch with the "
                        f"same settings, or delete {self.directory} to start over"
                    ),
                )
            return CheckpointRef(path, metadata), notes, None
        return None, notes, None

    def _find_old_format(self) -> str | None:
        """Return an error message if a checkpoint has another format; it names the record that would be replaced."""
        for path in self.run_dir.find_checkpoints():
            version = _read_format_version(path / CHECKPOINT_METADATA_FILE)
            if version in (None, _FORMAT_VERSION):
                continue
            record_file = self.run_dir.record_file
            schema_version = read_schema_version(record_file)
            replaced = (
                f"; the run then replaces {record_file}, a record of schema {schema_version}"
                if schema_version not in (None, SCHEMA_VERSION)
                else ""
            )
            return (
                f"Cannot resume from {path}: it has checkpoint format {version}, and this version reads format "
                f"{_FORMAT_VERSION}; delete {path.parent} to start over{replaced}"
            )
        return None

    def read_latest(self, key: str) -> Any:  # noqa: ANN401 — the type that was saved
        """Return one part of the state that the main process wrote to the newest valid checkpoint; None without one."""
        for path in self.list_checkpoints():
            if _read_valid_metadata(path) is not None:
                with contextlib.suppress(*_READ_ERRORS):
                    tree = serialization.load_tree(path / _rank_dir_name(0), torch.device("cpu"))
                    return tree.get(key)
        return None

    def load(self, checkpoint: CheckpointRef) -> tuple[dict[str, Any], bool]:
        """Return this process's state in a checkpoint, and whether the same process wrote it.

        Raises:
            CheckpointError: a process cannot read its files; all processes raise.
        """
        own_metadata = replace(self.metadata, measurement_fingerprint=checkpoint.metadata.measurement_fingerprint)
        rank, own = self.accelerator.process_index, checkpoint.metadata == own_metadata
        state: dict[str, Any] = {}
        problem = None
        try:
            source = 0 if self.metadata.replicated else rank
            state = serialization.load_tree(
                checkpoint.path / _rank_dir_name(source), self.accelerator.device, device_keys=("optimizer",)
            )
            if own and source != rank:
                state |= serialization.load_tree(checkpoint.path / _rank_dir_name(rank), self.accelerator.device)
        except _READ_ERRORS as error:
            problem = f"process {rank} cannot read its files of {checkpoint.path}: {error}"
        if problems := [other for other in all_gather_objects(self.accelerator, problem) if other is not None]:
            raise CheckpointError(problems[0], f"delete {self.directory} to start over")
        return state, own

    def delete_all(self) -> None:
        """Delete this training's checkpoints, including incomplete ones."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.directory, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty if another training has checkpoints
                self.directory.parent.rmdir()


def _rank_dir_name(rank: int) -> str:
    return f"rank-{rank}"


def _read_valid_metadata(path: Path) -> CheckpointMetadata | None:
    """Return a checkpoint's metadata, None if one of its files is missing or changed."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content: dict[str, Any] = json.loads((path / CHECKPOINT_METADATA_FILE).read_text(encoding="utf-8"))
        if all(_hash_file(path / name) == digest for name, digest in content["files"].items()):
            return CheckpointMetadata(**content["metadata"])
    return None


def _read_format_version(path: Path) -> int | None:
    """Return the format version in a checkpoint's metadata file, 1 if it has none; None if the file is not readable."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        version: int = json.loads(path.read_text(encoding="utf-8")).get("format_version", 1)
        return version
    return None


def _hash_file(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    hash_file(digest, path)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    """Flush a file, or a folder's directory entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
