"""Folders in which peftbench caches what it can compute again, and the bytes that they take."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from peftbench.common.filesystem import cache_dir
from peftbench.data.example_cache import cache_error

FEATURES_FOLDER = "feature_cache"
DOCSTRINGS_PREFIX = "docstrings-"


@dataclass(frozen=True)
class CacheUsage:
    """One kind of cached content."""

    kind: str
    """Name for ``peftbench cache --clear``."""
    content: str
    """Description of the content."""
    folders: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(_count_bytes(folder) for folder in self.folders)

    def clear(self) -> None:
        """Delete the folders. A run that has their files open can still read them.

        Raises:
            OutputError: a folder cannot be deleted.
        """
        for folder in self.folders:
            try:
                shutil.rmtree(folder)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise cache_error(folder, error) from error


def list_cache_usage() -> list[CacheUsage]:
    """Return what is cached, by kind."""
    from datasets import config

    data = Path(config.HF_DATASETS_CACHE)
    own = cache_dir()
    return [
        CacheUsage("examples", "examples of files and data sets, and their encodings", _find(data, "peftbench")),
        CacheUsage("copies", "copies of local data sets", _find(data, "peftbench-*")),
        CacheUsage("features", "hidden states of frozen parts (train.feature_cache)", _find(own, FEATURES_FOLDER)),
        CacheUsage("docstrings", "the docstring corpus", _find(own, f"{DOCSTRINGS_PREFIX}*")),
    ]


def _find(folder: Path, pattern: str) -> tuple[Path, ...]:
    return tuple(path for path in sorted(folder.glob(pattern)) if path.is_dir())


def _count_bytes(folder: Path) -> int:
    """Return the bytes on disk; blocks that a sparse file never wrote are not counted."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except OSError:  # deleted by another process
            continue
    return total
