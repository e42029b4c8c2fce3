"""Find an accelerate config by its path, or by its name in ``accel_configs/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from peftbench.errors import EngineError, MissingFileError, did_you_mean

_DIR_NAME = "accel_configs"


def find_accelerate_config(name: str) -> Path:
    """Return the accelerate config of that name in ``accel_configs/``, e.g. zero2, or at that path.

    Raises:
        MissingFileError: it does not exist; the message suggests the nearest name.
    """
    known = {path.stem: path for folder in _find_dirs() for path in sorted(folder.glob("*.yaml"))}
    path = known.get(name) or Path(name)
    if not path.is_file():
        raise MissingFileError(
            f"there is no accelerate config {name!r}",
            did_you_mean(path.stem, known) if known else "give the path of an accelerate config",
        )
    return path


def read_accelerate_config(path: Path) -> dict[str, Any]:
    """Return the keys of an accelerate config file.

    Raises:
        MissingFileError: the file cannot be read.
        EngineError: it is not a YAML mapping.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingFileError(f"cannot read the accelerate config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EngineError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise EngineError(f"{path} must be a mapping, as written by accelerate config")
    return config


def _find_dirs() -> list[Path]:
    return [
        folder / _DIR_NAME
        for folder in (Path(__file__).resolve().parents[3], Path.cwd())
        if (folder / _DIR_NAME).is_dir()
    ]
