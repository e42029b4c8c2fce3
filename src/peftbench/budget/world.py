"""How many processes a plan is of, and what spreads a training over them: from an accelerate config file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peftbench.engine.engines import SINGLE, EngineKind
from peftbench.errors import EngineError, MissingFileError

_TOLD = ("ACCELERATE_", "FSDP_")
"""Beginnings of the variables by which accelerate's launcher tells its processes what its file says."""


@dataclass(frozen=True)
class World:
    """Processes that train together; a plan is of the first one."""

    engine: EngineKind = SINGLE
    processes: int = 1
    launcher: Mapping[str, str] = field(default_factory=dict)
    """What the launcher tells each process by its environment."""

    @property
    def alone(self) -> bool:
        """Whether it is one process without an engine."""
        return self.engine == SINGLE


ALONE = World()


def launched(path: Path, processes: int | None = None) -> tuple[int, dict[str, str]]:
    """How many processes ``accelerate launch --config_file path`` starts, and what it tells them.

    Raises:
        MissingFileError, EngineError: there is no such file, or accelerate refuses it.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no accelerate config {path}", "accel_configs/ has some")
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    # The port is of no use here; 0 is any that is free.
    words = ["--config_file", str(path), "--main_process_port", "0", "--num_cpu_threads_per_process", "1"]
    words += ["--num_processes", str(processes)] if processes is not None else []
    try:
        asked, *_ = _validate_launch_command(launch_command_parser().parse_args([*words, "train.py"]))
        if asked.use_deepspeed:
            asked.deepspeed_fields_from_accelerate_config = ""
            _, environment = prepare_deepspeed_cmd_env(asked)
        else:
            environment = prepare_multi_gpu_env(asked)
    except (ValueError, TypeError, KeyError, AttributeError, ConnectionError) as error:
        raise EngineError(f"accelerate cannot launch from {path}: {str(error).splitlines()[0]}") from error
    return int(asked.num_processes), {key: value for key, value in environment.items() if key.startswith(_TOLD)}
