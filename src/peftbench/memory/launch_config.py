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
from peftbench.distributed.launcher_env import build_first_process_env, select_launcher_env
from peftbench.errors import EngineError, MissingFileError

if TYPE_CHECKING:
    from peftbench.recipe.schema import Recipe


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
        environ = build_first_process_env(os.environ, self.num_processes, self.launcher_env)
        return patch.dict(os.environ, environ, clear=True)


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
