"""Copies of an engine's accelerate and DeepSpeed config that do not depend on the current folder."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from peftbench.common.filesystem import write_atomically
from peftbench.distributed.accelerate_config import find_accelerate_config, read_accelerate_config
from peftbench.errors import MissingFileError

_DEEPSPEED_KEY, _FILE_KEY = "deepspeed_config", "deepspeed_config_file"


def copy_engine_files(engine: str, folder: Path, num_processes: int = 1) -> Path:
    """Copy the accelerate config ``engine`` and its DeepSpeed config to ``folder``; return the accelerate config.

    The path of the DeepSpeed config in it starts with ``folder``.

    Raises:
        MissingFileError: one of the two does not exist.
        OutputError: the folder cannot be written.
    """
    source = find_accelerate_config(engine)
    config = read_accelerate_config(source)
    name = Path(config[_DEEPSPEED_KEY][_FILE_KEY])
    deepspeed_file = source.parent.parent / name
    if not deepspeed_file.is_file():
        raise MissingFileError(f"{source} names {name}, but {deepspeed_file} does not exist; restore it")
    settings = json.loads(deepspeed_file.read_text(encoding="utf-8"))
    copied, accelerate_file = folder / name.name, folder / f"{engine}_accelerate.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(copied, json.dumps(settings, indent=2) + "\n")
    config |= {_DEEPSPEED_KEY: config[_DEEPSPEED_KEY] | {_FILE_KEY: str(copied)}, "num_processes": num_processes}
    write_atomically(accelerate_file, yaml.safe_dump(config, sort_keys=False))
    return accelerate_file
