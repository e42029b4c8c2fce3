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

from peftbench.training import serialization
from peftbench.distributed.collectives import all_gather_objects
from peftbench.errors import CheckpointError
from peftbench.common.filesystem import as_os_error, write_error

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINTS_DIR = "checkpoints"
PER_RANK_KEYS = ("random", "probe", "kept")
"""Parts of a state that each process has of its own, where all else is alike."""
_METADATA_FILE = "checkpoint.json"
_PARTIAL_SUFFIX = ".unfinished"
_READ_ERRORS = (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError)
_WRITE_ERRORS = (OSError, SafetensorError, TypeError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint is of, and what made it."""

    recipe_fingerprint: str
    model_identity: str
    data_identity: str
    engine: str
    processes: int
    device: str
    versions: dict[str, str]

    @property
    def training(self) -> str:
        """What is trained on what, in one word: of another recipe, base or data it is another."""
        identity = json.dumps([self.recipe_fingerprint, self.model_identity, self.data_identity])
        return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()

    @property
    def replicated(self) -> bool:
        """Whether each process has everything, so that any number of them can go on with the first one's part."""
        return self.engine in {"single", "ddp"}

    def differences(self, other: CheckpointMetadata) -> list[str]:
        """What keeps this one from going on with what ``other`` made, in words."""
        found = [] if self.replicated and other.replicated else [
            f"{what} {theirs} instead of {mine}"
            for what, mine, theirs in (
                ("engine", self.engine, other.engine), ("processes", self.processes, other.processes),
            ) if mine != theirs
        ]  # fmt: skip
        if self.device != other.device:
            found.append(f"device {other.device} instead of {self.device}")
        return found + [
            f"{name} {other.versions.get(name)} instead of {version}"
            for name, version in self.versions.items() if other.versions.get(name) != version
        ]  # fmt: skip


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint to go on from."""

    path: Path
    origin: CheckpointMetadata


class CheckpointManager:
    """The checkpoints of one run, in a folder of its own for each recipe, base and data."""

    def __init__(self, accelerator: Accelerator, run_folder: Path, origin: CheckpointMetadata, keep: int) -> None:
        self.accelerator, self.origin, self.keep = accelerator, origin, keep
        self.folder = run_folder / CHECKPOINTS_DIR / origin.training
        self.notes: list[str] = []

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write this process's part; when all have, the checkpoint is there, and the oldest beyond ``keep`` are not.

        Raises:
            OutputError, DiskFullError: a process cannot write; all raise, and the checkpoints before stay.
        """
        final = self.folder / f"step-{step:08d}"
        unfinished = final.with_name(f"{final.name}{_PARTIAL_SUFFIX}")
        rank = self.accelerator.process_index
        if self.origin.replicated and rank > 0:  # the first has the rest
            state = {key: state[key] for key in PER_RANK_KEYS if key in state}

        def begin() -> None:
            if self.accelerator.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)

        def finish() -> None:
            if self.accelerator.is_main_process:
                self._finish(step, unfinished, final)

        for work in (begin, lambda: serialization.save_tree(state, unfinished / _rank_dir_name(rank)), finish):
            self._together(work, final, unfinished)

    def _together(self, work: Callable[[], None], final: Path, unfinished: Path) -> None:
        problem: tuple[int | None, str] | None = None
        try:
            work()
        except _WRITE_ERRORS as error:
            found = as_os_error(error)
            problem = found.errno, found.strerror or str(found)
        problems = [said for said in all_gather_objects(self.accelerator, problem) if said is not None]
        if problems:
            if self.accelerator.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise write_error(final, OSError(*problems[0]))

    def _finish(self, step: int, unfinished: Path, final: Path) -> None:
        for rank in range(self.accelerator.num_processes):
            if not (unfinished / _rank_dir_name(rank)).is_dir():
                raise OSError(None, f"the part of process {rank} is not there: all processes must share this folder")
        files = {str(path.relative_to(unfinished)): _hash_file(path) for path in sorted(unfinished.rglob("*.*"))}
        meta = {"step": step, "origin": asdict(self.origin), "files": files}
        (unfinished / _METADATA_FILE).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for path in (*unfinished.rglob("*"), unfinished):
            _fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        _fsync(self.folder)
        for old in self.found()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def found(self) -> list[Path]:
        """Finished checkpoints, the newest first."""
        return sorted((path.parent for path in self.folder.glob(f"step-*[0-9]/{_METADATA_FILE}")), reverse=True)

    def newest(self) -> CheckpointRef | None:
        """The newest whole checkpoint of this very run, None where there is none; what is damaged is told and removed.

        Raises:
            CheckpointError: it was made by something that cannot be left (engine, processes, device, versions).
        """
        chosen: tuple[CheckpointRef | None, list[str], str | None] = (None, [], None)
        if self.accelerator.is_main_process:
            chosen = self._chosen()
        if self.accelerator.num_processes > 1:
            (chosen,) = broadcast_object_list([chosen])
        found, notes, refusal = chosen
        self.notes += notes
        if refusal is not None:
            raise CheckpointError(refusal)
        return found

    def _chosen(self) -> tuple[CheckpointRef | None, list[str], str | None]:
        others = [path for path in self.folder.parent.glob("*") if path.is_dir() and path != self.folder]
        notes = [
            f"checkpoints of another recipe, base or data lie in {path} and were left alone" for path in sorted(others)
        ]
        for path in self.folder.glob(f"*{_PARTIAL_SUFFIX}"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.found():
            origin = _read_valid_metadata(path)
            if origin is None:
                notes.append(f"the checkpoint {path.name} was damaged and was taken away")
                shutil.rmtree(path, ignore_errors=True)
                continue
            if differences := self.origin.differences(origin):
                return None, notes, (
                    f"{path} cannot be gone on with, since it was made with {', '.join(differences)}; launch it as it "
                    f"was, or remove {self.folder} to begin anew"
                )  # fmt: skip
            return CheckpointRef(path, origin), notes, None
        return None, notes, None

    def read(self, found: CheckpointRef) -> tuple[dict[str, Any], bool]:
        """The state of this process in a checkpoint, and whether it was this very process's.

        Raises:
            CheckpointError: a process cannot read its part; all raise.
        """
        rank, own = self.accelerator.process_index, found.origin == self.origin
        state: dict[str, Any] = {}
        problem = None
        try:
            first = 0 if self.origin.replicated else rank
            state = serialization.load_tree(found.path / _rank_dir_name(first), self.accelerator.device, moved=("optimizer",))
            if own and first != rank:
                state |= serialization.load_tree(found.path / _rank_dir_name(rank), self.accelerator.device)
        except _READ_ERRORS as error:
            problem = f"process {rank} cannot read its part of {found.path}: {error}"
        if problems := [said for said in all_gather_objects(self.accelerator, problem) if said is not None]:
            raise CheckpointError(problems[0], f"remove {self.folder} to begin anew")
        return state, own

    def forget(self) -> None:
        """Take those of this training away, with what was not finished."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # others may lie there
                self.folder.parent.rmdir()


def _rank_dir_name(rank: int) -> str:
    return f"rank-{rank}"


def _read_valid_metadata(path: Path) -> CheckpointMetadata | None:
    """Where a checkpoint is from, None where a file of it is missing or is not what was written."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        meta: dict[str, Any] = json.loads((path / _METADATA_FILE).read_text(encoding="utf-8"))
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
