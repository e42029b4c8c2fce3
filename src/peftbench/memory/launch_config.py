"""How many processes a plan is of, and what spreads a training over them: from an accelerate config file."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from peftbench.data.batches import check_divisible
from peftbench.distributed.accelerator import resolve_engine
from peftbench.distributed.engines import SINGLE, EngineKind
from peftbench.errors import EngineError, MissingFileError

if TYPE_CHECKING:
    from peftbench.recipe.schema import Recipe

_LAUNCHER_ENV_PREFIXES = ("ACCELERATE_", "FSDP_")
"""Beginnings of the variables by which accelerate's launcher tells its processes what its file says."""
_HOST_SPECIFIC_VARIABLES = frozenset({"ACCELERATE_USE_CPU"})
"""Those that speak of the machine it was started on; a plan is of a GPU."""


@dataclass(frozen=True)
class LaunchConfig:
    """Processes that train together; a plan is of the first one."""

    engine: EngineKind = SINGLE
    num_processes: int = 1
    launcher_env: Mapping[str, str] = field(default_factory=dict)
    """What the launcher tells each process by its environment."""

    @property
    def is_single_process(self) -> bool:
        """Whether it is one process without an engine."""
        return self.engine == SINGLE

    def patch_environ(self) -> AbstractContextManager[object]:
        """What the launcher gives to its first process, in the place of what this one was given."""
        told = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(self.num_processes),
            "LOCAL_WORLD_SIZE": str(self.num_processes),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "0",
            "OMP_NUM_THREADS": "1",  # or accelerate would set the threads of this process
        }
        kept = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER_ENV_PREFIXES)}
        return patch.dict(os.environ, kept | told | dict(self.launcher_env), clear=True)


SINGLE_PROCESS = LaunchConfig()


def load_launch_config(path: Path, num_processes: int | None, recipe: Recipe) -> LaunchConfig:
    """The processes that ``accelerate launch --config_file path`` starts for ``recipe``.

    Raises:
        MissingFileError, EngineError: there is no such file, accelerate refuses it, or it asks for no known engine.
    """
    with suppress_library_output():
        started, launcher = _parse_accelerate_config(path, num_processes)
    return build_launch_config(started, launcher, recipe)


def build_launch_config(num_processes: int, launcher_env: Mapping[str, str], recipe: Recipe) -> LaunchConfig:
    """The processes that a launcher starts for ``recipe``, by what it tells each.

    Raises:
        EngineError: it asks for no known engine.
    """
    with (
        suppress_library_output(),
        LaunchConfig(num_processes=num_processes, launcher_env=launcher_env).patch_environ(),
    ):
        engine, _ = resolve_engine(recipe, Path(), num_processes)
    check_divisible(recipe.train.global_batch_size, num_processes)
    return LaunchConfig(engine, num_processes, launcher_env)


def select_launcher_env(environment: Mapping[str, str]) -> dict[str, str]:
    """What a launcher has told a process, of all that is in its environment."""
    return {
        key: value
        for key, value in environment.items()
        if key.startswith(_LAUNCHER_ENV_PREFIXES) and key not in _HOST_SPECIFIC_VARIABLES
    }


@contextmanager
def suppress_library_output() -> Iterator[None]:
    """What libraries tell a training's log: not here. DeepSpeed would write it to the output."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _parse_accelerate_config(path: Path, num_processes: int | None = None) -> tuple[int, dict[str, str]]:
    """How many processes ``accelerate launch --config_file path`` starts, and what it tells them.

    Raises:
        MissingFileError, EngineError: there is no such file, or accelerate refuses it.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no accelerate config {path}", "accel_configs/ has some")
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
    from yaml import YAMLError

    # The port is of no use here; 0 is any that is free.
    words = ["--config_file", str(path), "--main_process_port", "0", "--num_cpu_threads_per_process", "1"]
    words += ["--num_processes", str(num_processes)] if num_processes is not None else []
    try:
        asked, *_ = _validate_launch_command(launch_command_parser().parse_args([*words, "train.py"]))
        if asked.use_deepspeed:
            asked.deepspeed_fields_from_accelerate_config = ""
            _, environment = prepare_deepspeed_cmd_env(asked)
        else:
            environment = prepare_multi_gpu_env(asked)
        return int(asked.num_processes), select_launcher_env(environment)
    except (YAMLError, ValueError, TypeError, KeyError, AttributeError, ConnectionError) as error:
        raise EngineError(f"accelerate cannot launch from {path}: {str(error).splitlines()[0]}") from error
