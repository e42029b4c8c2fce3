"""Checkpoints: folders that are whole or not there, the newest few of them, each with what it may be read by.

Processes decide together: the main one chooses, and what one of them cannot do is refused by all, so that none waits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from peftbench.common.filesystem import as_os_error, write_error
from peftbench.distributed.collectives import all_gather_objects
from peftbench.errors import CheckpointError
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

PER_RANK_KEYS = ("random", "probe", "kept")
"""Parts of a state that each process has of its own, where all else is alike."""
_READ_ERRORS = (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError)
_WRITE_ERRORS = (OSError, SafetensorError, TypeError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint is of, and what made it."""

    recipe_fingerprint: str
    model_fingerprint: str
    data_fingerprint: str
    engine: str
    world_size: int
    device: str
    versions: dict[str, str]

    @property
    def training_id(self) -> str:
        """What is trained on what, in one word: of another recipe, base or data it is another."""
        identity = json.dumps([self.recipe_fingerprint, self.model_fingerprint, self.data_fingerprint])
        return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()

    @property
    def replicated(self) -> bool:
        """Whether each process has everything, so that any number of them can go on with the first one's part."""
        return self.engine in {"single", "ddp"}

    def incompatibilities(self, other: CheckpointMetadata) -> list[str]:
        """What keeps this one from going on with what ``other`` made, in words."""
        found = (
            []
            if self.replicated and other.replicated
            else [
                f"{what} {theirs} instead of {mine}"
                for what, mine, theirs in (
                    ("engine", self.engine, other.engine),
                    ("processes", self.world_size, other.world_size),
                )
                if mine != theirs
            ]
        )
        if self.device != other.device:
            found.append(f"device {other.device} instead of {self.device}")
        return found + [
            f"{name} {other.versions.get(name)} instead of {version}"
            for name, version in self.versions.items()
            if other.versions.get(name) != version
        ]


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint to go on from."""

    path: Path
    metadata: CheckpointMetadata


class CheckpointManager:
    """The checkpoints of one run, in a folder of its own for each recipe, base and data."""

    def __init__(self, accelerator: Accelerator, run_dir: Path, metadata: CheckpointMetadata, keep_latest: int) -> None:
        self.accelerator, self.metadata, self.keep_latest = accelerator, metadata, keep_latest
        self.directory = RunDir(run_dir).checkpoints_dir / metadata.training_id
        self.notes: list[str] = []

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write this process's part; when all have, the checkpoint is there, and the oldest beyond ``keep`` are not.

        Raises:
            OutputError, DiskFullError: a process cannot write; all raise, and the checkpoints before stay.
        """
        final = self.directory / get_checkpoint_name(step)
        unfinished = final.with_name(f"{final.name}{PARTIAL_SUFFIX}")
        rank = self.accelerator.process_index
        if self.metadata.replicated and rank > 0:  # the first has the rest
            state = {key: state[key] for key in PER_RANK_KEYS if key in state}

        def begin() -> None:
            if self.accelerator.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)

        def finish() -> None:
            if self.accelerator.is_main_process:
                self._commit(step, unfinished, final)

        for work in (begin, lambda: serialization.save_tree(state, unfinished / _rank_dir_name(rank)), finish):
            self._run_on_all_ranks(work, final, unfinished)

    def _run_on_all_ranks(self, fn: Callable[[], None], final_dir: Path, partial_dir: Path) -> None:
        problem: tuple[int | None, str] | None = None
        try:
            fn()
        except _WRITE_ERRORS as error:
            found = as_os_error(error)
            problem = found.errno, found.strerror or str(found)
        problems = [said for said in all_gather_objects(self.accelerator, problem) if said is not None]
        if problems:
            if self.accelerator.is_main_process:
                shutil.rmtree(partial_dir, ignore_errors=True)
            raise write_error(final_dir, OSError(*problems[0]))

    def _commit(self, step: int, partial_dir: Path, final_dir: Path) -> None:
        for rank in range(self.accelerator.num_processes):
            if not (partial_dir / _rank_dir_name(rank)).is_dir():
                raise OSError(None, f"the part of process {rank} is not there: all processes must share this folder")
        files = {str(path.relative_to(partial_dir)): _hash_file(path) for path in sorted(partial_dir.rglob("*.*"))}
        meta = {"step": step, "origin": asdict(self.metadata), "files": files}
        (partial_dir / CHECKPOINT_METADATA_FILE).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for path in (*partial_dir.rglob("*"), partial_dir):
            _fsync(path)
        shutil.rmtree(final_dir, ignore_errors=True)
        partial_dir.rename(final_dir)
        _fsync(self.directory)
        for old in self.list_checkpoints()[self.keep_latest :]:
            shutil.rmtree(old, ignore_errors=True)

    def list_checkpoints(self) -> list[Path]:
        """Finished checkpoints, the newest first."""
        return list_checkpoints(self.directory)

    def latest(self) -> CheckpointRef | None:
        """The newest whole checkpoint of this very run, None where there is none; what is damaged is told and removed.

        Raises:
            CheckpointError: it was made by something that cannot be left (engine, processes, device, versions).
        """
        chosen: tuple[CheckpointRef | None, list[str], str | None] = (None, [], None)
        if self.accelerator.is_main_process:
            chosen = self._select_latest()
        if self.accelerator.num_processes > 1:
            (chosen,) = broadcast_object_list([chosen])
        found, notes, refusal = chosen
        self.notes += notes
        if refusal is not None:
            raise CheckpointError(refusal)
        return found

    def _select_latest(self) -> tuple[CheckpointRef | None, list[str], str | None]:
        others = [path for path in self.directory.parent.glob("*") if path.is_dir() and path != self.directory]
        notes = [
            f"checkpoints of another recipe, base or data lie in {path} and were left alone" for path in sorted(others)
        ]
        for path in self.directory.glob(f"*{PARTIAL_SUFFIX}"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.list_checkpoints():
            origin = _read_valid_metadata(path)
            if origin is None:
                notes.append(f"the checkpoint {path.name} was damaged and was taken away")
                shutil.rmtree(path, ignore_errors=True)
                continue
            if differences := self.metadata.incompatibilities(origin):
                return (
                    None,
                    notes,
                    (
                        f"{path} cannot be gone on with, since it was made with {', '.join(differences)}; launch it as it "
                        f"was, or remove {self.directory} to begin anew"
                    ),
                )
            return CheckpointRef(path, origin), notes, None
        return None, notes, None

    def load(self, checkpoint: CheckpointRef) -> tuple[dict[str, Any], bool]:
        """The state of this process in a checkpoint, and whether it was this very process's.

        Raises:
            CheckpointError: a process cannot read its part; all raise.
        """
        rank, own = self.accelerator.process_index, checkpoint.metadata == self.metadata
        state: dict[str, Any] = {}
        problem = None
        try:
            first = 0 if self.metadata.replicated else rank
            state = serialization.load_tree(
                checkpoint.path / _rank_dir_name(first), self.accelerator.device, device_keys=("optimizer",)
            )
            if own and first != rank:
                state |= serialization.load_tree(checkpoint.path / _rank_dir_name(rank), self.accelerator.device)
        except _READ_ERRORS as error:
            problem = f"process {rank} cannot read its part of {checkpoint.path}: {error}"
        if problems := [said for said in all_gather_objects(self.accelerator, problem) if said is not None]:
            raise CheckpointError(problems[0], f"remove {self.directory} to begin anew")
        return state, own

    def delete_all(self) -> None:
        """Take those of this training away, with what was not finished."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.directory, ignore_errors=True)
            with contextlib.suppress(OSError):  # others may lie there
                self.directory.parent.rmdir()


def _rank_dir_name(rank: int) -> str:
    return f"rank-{rank}"


def _read_valid_metadata(path: Path) -> CheckpointMetadata | None:
    """Where a checkpoint is from, None where a file of it is missing or is not what was written."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        meta: dict[str, Any] = json.loads((path / CHECKPOINT_METADATA_FILE).read_text(encoding="utf-8"))
        if all(_hash_file(path / name) == digest for name, digest in meta["files"].items()):
            return CheckpointMetadata(**meta["origin"])
    return None


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        made: Callable[[], Any] = lambda: hashlib.blake2b(digest_size=16)  # noqa: E731
        return hashlib.file_digest(file, made).hexdigest()


def _fsync(path: Path) -> None:
    """Have the system write a file or a folder's names to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
