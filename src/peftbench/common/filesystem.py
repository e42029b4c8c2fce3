"""Cache folder, atomic writes, disk errors and packaged JSON files."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import IO, TypeVar

import platformdirs
from pydantic import BaseModel

from peftbench.common.text import expand_home
from peftbench.errors import DiskFullError, OutputError

ResourceT = TypeVar("ResourceT", bound=BaseModel)

CACHE_DIR_ENV = "PEFTBENCH_CACHE"
UNWRITABLE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})
"""``errno`` values caused by the destination of a write, not by the data that was read."""


def path_exists(path: Path) -> bool:
    """True if ``path`` exists; False also if its name is longer than the file system allows."""
    return os.path.exists(path)  # noqa: PTH110 — Path.exists raises for such a name


def cache_dir() -> Path:
    """Return the cache folder: ``$PEFTBENCH_CACHE``, else the platform's cache folder for peftbench."""
    return Path(expand_home(os.environ.get(CACHE_DIR_ENV) or platformdirs.user_cache_dir("peftbench")))


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` atomically: after a crash the file has its full old or full new content.

    Raises:
        DiskFullError: no space left, or quota exceeded; no partial file remains.
        OutputError: the folder cannot be created or written.
    """
    with open_atomically(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def open_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that takes the place of ``path`` when the block ends without an error.

    Raises:
        DiskFullError: no space left, or quota exceeded; no partial file remains.
        OutputError: the folder cannot be created or written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_get_umask())
        temporary.replace(path)
    except BaseException as error:  # also on interrupts and encoding errors: leave no temporary file
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def write_error(path: Path, error: OSError) -> OutputError:
    """Return the exception that explains why ``path`` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"the disk is full: {path} could not be written ({error.strerror})")
    return OutputError(f"cannot write {path}: {error.strerror or error}")


def as_os_error(error: Exception) -> OSError:
    """Return ``error`` as an OSError. safetensors raises its own exception, with the errno in its text."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number.group(1)), os.strerror(int(number.group(1)))) if number else OSError(None, str(error))


def _get_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_json_resources(package: str, kind: type[ResourceT], *folders: str) -> dict[str, ResourceT]:
    """Load every JSON file of ``package``, or of a folder in it, sorted by its name without the suffix."""
    directory = resources.files(package).joinpath(*folders)
    files = (path for path in directory.iterdir() if path.name.endswith(".json"))
    loaded = {path.name.removesuffix(".json"): kind.model_validate_json(path.read_bytes()) for path in files}
    return dict(sorted(loaded.items()))
