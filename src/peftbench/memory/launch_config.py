"""Read the number of processes and the distributed engine of a plan from an accelerate config file."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from peftbench.data.batches import check_divisible
from peftbench.distributed.accelerator import resolve_engine
from peftbench.distributed.engines import SINGLE, EngineKind
from peftbench.distributed.launcher_env import build_first_process_env, select_launcher_env
from peftbench.errors import EngineError, MissingFileError

if TYPE_CHECKING:
    from peftbench.recipe.schema import Recipe


@dataclass(frozen=True)
class LaunchConfig:
    """The processes of one training and their engine; a plan is for rank 0."""

    engine: EngineKind = SINGLE
    num_processes: int = 1
    launcher_env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that the launcher sets in each process."""

    @property
    def is_single_process(self) -> bool:
        """True for one process without an engine."""
        return self.engine == SINGLE

    @property
    def dp_world_size(self) -> int:
        """Number of processes that divide the data: all of them, since no engine shares examples."""
        return self.num_processes

    def patch_environ(self) -> AbstractContextManager[object]:
        """Replace this process's launcher variables with those of rank 0."""
        environ = build_first_process_env(os.environ, self.num_processes, self.launcher_env)
        return patch.dict(os.environ, environ, clear=True)


SINGLE_PROCESS = LaunchConfig()


def load_launch_config(path: Path, num_processes: int | None, recipe: Recipe) -> LaunchConfig:
    """Return the processes that ``accelerate launch --config_file path`` starts for ``recipe``.

    Raises:
        MissingFileError: the file does not exist.
        EngineError: accelerate rejects the file, or its engine is unknown.
    """
    with suppress_library_output():
        num_processes, launcher_env = _parse_accelerate_config(path, num_processes)
    return build_launch_config(num_processes, launcher_env, recipe)


def build_launch_config(num_processes: int, launcher_env: Mapping[str, str], recipe: Recipe) -> LaunchConfig:
    """Return the processes that a launcher with this environment starts for ``recipe``.

    Raises:
        EngineError: the engine is unknown.
    """
    launch_config = LaunchConfig(num_processes=num_processes, launcher_env=launcher_env)
    with suppress_library_output(), launch_config.patch_environ():
        engine, _ = resolve_engine(recipe, Path(), launch_config.dp_world_size)
    check_divisible(recipe.train.global_batch_size, launch_config.dp_world_size)
    return replace(launch_config, engine=engine)


@contextmanager
def suppress_library_output() -> Iterator[None]:
    """Suppress log messages and warnings of libraries, and redirect what they print from stdout to stderr."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _parse_accelerate_config(path: Path, num_processes: int | None = None) -> tuple[int, dict[str, str]]:
    """Return the number of processes that ``accelerate launch --config_file path`` starts, and their environment.

    Raises:
        MissingFileError: the file does not exist.
        EngineError: accelerate rejects the file.
    """
    if not path.is_file():
        raise MissingFileError(f"The accelerate config {path} does not exist", "examples are in accel_configs/")
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
    from yaml import YAMLError

    # No process is started, so any port will do.
    arguments = ["--config_file", str(path), "--main_process_port", "0", "--num_cpu_threads_per_process", "1"]
    arguments += ["--num_processes", str(num_processes)] if num_processes is not None else []
    try:
        launch_args, *_ = _validate_launch_command(launch_command_parser().parse_args([*arguments, "train.py"]))
        if launch_args.use_deepspeed:
            launch_args.deepspeed_fields_from_accelerate_config = ""
            _, environment = prepare_deepspeed_cmd_env(launch_args)
        else:
            environment = prepare_multi_gpu_env(launch_args)
        return int(launch_args.num_processes), select_launcher_env(environment)
    except (YAMLError, ValueError, TypeError, KeyError, AttributeError, ConnectionError) as error:
        raise EngineError(f"accelerate rejects {path}: {str(error).splitlines()[0]}") from error
