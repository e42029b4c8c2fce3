"""The environment variables by which ``accelerate launch`` and torchrun configure their processes.

No other module reads them. Only ``runs_on_cpu`` imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ACCELERATE_ENV_PREFIXES = ("ACCELERATE_", "FSDP_")
"""Prefixes of the variables by which accelerate's launcher passes its config file to its processes."""
_HOST_SPECIFIC_VARIABLES = frozenset({"ACCELERATE_USE_CPU"})
"""Variables that describe the machine of the launch; a memory plan is for a GPU."""
_LAUNCHER_ENV_PREFIXES = (
    *ACCELERATE_ENV_PREFIXES,
    "TORCHELASTIC_",
    "MASTER_",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_",
    "ROLE_",
    "DEEPSPEED_",
)
"""Prefixes of everything that a launcher sets for its processes."""


def get_rank() -> int:
    """Return this process's rank: 0 for the main process, and without a launcher."""
    return int(os.environ.get("RANK", "0"))


def get_world_size() -> int:
    """Return the number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def get_local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", get_world_size()))


def get_local_rank() -> int:
    """Return this process's number among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_node_rank() -> str:
    """Return the number of this machine, which torchrun calls its group rank. Machines may share a host name."""
    return os.environ.get("GROUP_RANK", "0")


def runs_on_cpu() -> bool:
    """True if no GPU is available or the launcher requests the CPU."""
    import torch

    return not torch.cuda.is_available() or is_cpu_requested()


def is_cpu_requested() -> bool:
    """True if the accelerate config sets ``use_cpu: true``."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}


def is_every_gpu_hidden() -> bool:
    """True if CUDA_VISIBLE_DEVICES hides every GPU."""
    return set(os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")) <= {"", "-1"}


def is_launched_by_accelerate() -> bool:
    """True if ``accelerate launch`` started this process; a plain ``python`` sets neither variable."""
    return not {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"}.isdisjoint(os.environ)


def has_lost_workers() -> bool:
    """True if the launcher was configured for several processes and started only this one.

    For some configs (e.g. MULTI_CPU without mpirun) accelerate's launcher sets the address of a rendezvous but no rank.
    """
    single = "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ
    return single and "MASTER_ADDR" in os.environ and not is_set_in_parent_process("MASTER_ADDR")


def is_set_in_parent_process(variable: str) -> bool:
    """True if the parent process's own environment has the variable, so that the parent did not add it."""
    try:
        environ = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:  # not Linux: without evidence, assume that the launcher did not set it
        return True
    return any(entry.startswith(f"{variable}=".encode()) for entry in environ.split(b"\0"))


def get_launched_accumulation_steps() -> str:
    """Return the gradient accumulation steps of the accelerate config, "1" if it sets none."""
    return os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")


def get_unsupported_accelerate_settings() -> dict[str, str]:
    """Return the values of accelerate config keys that would change the computation or its memory, by key."""
    return {
        "fsdp_activation_checkpointing": os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false"),
        "dynamo_config": os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no"),
        "parallelism_config": os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false"),
    }


def is_deepspeed_requested() -> bool:
    """True if the launcher requests DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def get_deepspeed_config_path() -> str | None:
    """Return the path of the DeepSpeed config file, None if the accelerate config names none."""
    return os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or None


def is_fsdp_requested() -> bool:
    """True if the launcher requests FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def get_fsdp_version() -> str:
    """Return the ``fsdp_version`` of the accelerate config."""
    return os.environ.get("FSDP_VERSION", "1")


def is_fsdp_offload_requested() -> bool:
    """True if the accelerate config offloads FSDP's parameters."""
    return os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true"


def select_launcher_env(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of accelerate's launcher that select an engine, without those of one machine."""
    return {
        key: value
        for key, value in environ.items()
        if key.startswith(ACCELERATE_ENV_PREFIXES) and key not in _HOST_SPECIFIC_VARIABLES
    }


def without_launcher_env(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without anything a launcher set, for a subprocess outside of the process group."""
    return {key: value for key, value in environ.items() if not key.startswith(_LAUNCHER_ENV_PREFIXES)}


def build_first_process_env(
    environ: Mapping[str, str], num_processes: int, launcher_env: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment of the first of ``num_processes`` processes that a launcher with these settings starts."""
    first_process = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
        "OMP_NUM_THREADS": "1",  # otherwise accelerate sets the threads of this process
    }
    inherited = {key: value for key, value in environ.items() if not key.startswith(ACCELERATE_ENV_PREFIXES)}
    return inherited | first_process | dict(launcher_env)
