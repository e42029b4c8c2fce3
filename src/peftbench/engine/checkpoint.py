"""Checkpoints: folders that are whole or not there, the newest few of them, each with what it may be read by."""

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

from safetensors import SafetensorError

from peftbench.engine import safetree
from peftbench.errors import CheckpointError
from peftbench.files import write_error

if TYPE_CHECKING:
    from accelerate import Accelerator

FOLDER = "checkpoints"
_META = "checkpoint.json"
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Origin:
    """What a checkpoint is of, and in how many parts."""

    recipe_fingerprint: str
    model_identity: str
    data_identity: str
    engine: str
    processes: int

    @property
    def replicated(self) -> bool:
        """Whether each process has everything, so that any number of them can go on with the first one's part."""
        return self.engine in {"single", "ddp"}


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, accelerator: Accelerator, run_folder: Path, origin: Origin, keep: int) -> None:
        self.accelerator, self.origin, self.keep = accelerator, origin, keep
        self.folder = run_folder / FOLDER

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write this process's part; when all have, the checkpoint is there, and the oldest beyond ``keep`` are not.

        Raises:
            OutputError, DiskFullError: it cannot be written; those before it stay.
        """
        final = self.folder / f"step-{step:08d}"
        unfinished = final.with_name(f"{final.name}{_UNFINISHED}")
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            safetree.write(state, unfinished / _part(self.accelerator.process_index))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self._finish(step, unfinished, final)
            self.accelerator.wait_for_everyone()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise write_error(final, error if isinstance(error, OSError) else OSError(str(error))) from error

    def _finish(self, step: int, unfinished: Path, final: Path) -> None:
        files = {str(path.relative_to(unfinished)): _digest(path) for path in sorted(unfinished.rglob("*.*"))}
        meta = {"step": step, "origin": asdict(self.origin), "files": files}
        (unfinished / _META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for path in (*unfinished.rglob("*"), unfinished):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        _sync(self.folder)
        for old in self.found()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def found(self) -> list[Path]:
        """Finished checkpoints, the newest first."""
        return sorted((path.parent for path in self.folder.glob(f"step-*[0-9]/{_META}")), reverse=True)

    def newest(self) -> Path | None:
        """The newest whole checkpoint of this very run, None where there is none.

        Raises:
            CheckpointError: it was made by an engine or a number of processes that cannot be left.
        """
        for path in self.found():
            meta = _whole(path)
            if meta is None:
                continue
            origin = Origin(**meta["origin"])
            same = (origin.recipe_fingerprint, origin.model_identity, origin.data_identity) == (
                self.origin.recipe_fingerprint, self.origin.model_identity, self.origin.data_identity,
            )  # fmt: skip
            if not same:
                continue
            if not (origin.replicated and self.origin.replicated) and origin != self.origin:
                raise CheckpointError(
                    f"{path} was made by {origin.engine} in {origin.processes} processes, whose parts "
                    f"{self.origin.engine} in {self.origin.processes} cannot take up; launch it as it was, or remove "
                    f"{self.folder} to begin anew"
                )
            return path
        return None

    def read(self, path: Path) -> tuple[dict[str, Any], bool]:
        """This process's part of a checkpoint, and whether it is its own."""
        own = path / _part(self.accelerator.process_index)
        mine = own.is_dir() and json.loads((path / _META).read_text(encoding="utf-8"))["origin"] == asdict(self.origin)
        return safetree.read(own if mine else path / _part(0), self.accelerator.device), mine

    def forget(self) -> None:
        """Take all away, with what was not finished."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)


def _part(rank: int) -> str:
    return f"rank-{rank}"


def _whole(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself, None where a file of it is missing or is not what was written."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        meta: dict[str, Any] = json.loads((path / _META).read_text(encoding="utf-8"))
        if all(_digest(path / name) == digest for name, digest in meta["files"].items()):
            return meta
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        made: Callable[[], Any] = lambda: hashlib.blake2b(digest_size=16)  # noqa: E731
        return hashlib.file_digest(file, made).hexdigest()


def _sync(path: Path) -> None:
    """Have the system write a file or a folder's names to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
