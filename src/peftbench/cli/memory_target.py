"""The device, budget and processes that the options of ``estimate`` and ``fit`` name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftbench.memory.devices import DeviceFacts
    from peftbench.memory.launch_config import LaunchConfig
    from peftbench.memory.search import MemoryTarget
    from peftbench.recipe.schema import Recipe


def find_accelerate_file(accelerate: str | None, suite: Path | None = None) -> Path | None:
    """Return the accelerate config of the option, else the suite's, None without one."""
    from peftbench.distributed.accelerate_config import find_accelerate_config
    from peftbench.suite.expand import resolve_accelerate_config

    if accelerate is not None:
        return find_accelerate_config(accelerate)
    return None if suite is None else resolve_accelerate_config(suite)


def load_device_facts(device: str | None) -> DeviceFacts:
    """Return the profile of a device; without one, the facts of an unknown GPU.

    Raises:
        DeviceError: there is no such profile.
    """
    from peftbench.memory.devices import UNKNOWN_DEVICE, get_device_facts

    return get_device_facts(device) if device else UNKNOWN_DEVICE


@dataclass(frozen=True)
class TargetOptions:
    """The options that name a device, a budget and processes."""

    facts: DeviceFacts
    device: str | None
    budget: str | None
    accelerate: Path | None
    processes: int | None

    def build_target(self, recipe: Recipe) -> MemoryTarget:
        """Return the device, the budget and the launch that ``recipe`` is planned for.

        Raises:
            BudgetError: the budget exceeds the device's memory, or there are processes without an engine.
            EngineError: the accelerate config is not valid.
        """
        from peftbench.memory.search import MemoryTarget

        size = _resolve_budget(self.budget, self.facts, recipe)
        launch_config = _build_launch_config(self.accelerate, self.processes, recipe)
        return MemoryTarget(self.facts, self.device or self.facts.torch_name, size, launch_config)


def _resolve_budget(requested: str | None, facts: DeviceFacts, recipe: Recipe) -> int | None:
    """Return the budget in bytes: the option's, else the recipe's, else the device's memory."""
    from peftbench.common.units import parse_size
    from peftbench.errors import BudgetError

    device_bytes = facts.least_memory
    size = recipe.budget.memory_bytes if requested is None else parse_size(requested)
    if size is not None and device_bytes and size > int(facts.memory[1]):
        raise BudgetError(
            f"the budget of {_format_gib(size)} exceeds the {_format_gib(int(facts.memory[1]))} of {facts.torch_name}; "
            "lower it, or omit it to use all of the device's memory"
        )
    return size or device_bytes or None


def _format_gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _build_launch_config(accelerate_config: Path | None, processes: int | None, recipe: Recipe) -> LaunchConfig:
    """Return the processes to plan for."""
    from peftbench.errors import BudgetError
    from peftbench.memory.launch_config import SINGLE_PROCESS, load_launch_config
    from peftbench.memory.search import with_micro_batch

    if accelerate_config is None and processes is not None:
        raise BudgetError("--processes needs a distributed engine; give --accelerate too")
    if accelerate_config is None:
        return SINGLE_PROCESS
    # The launch does not depend on the micro-batch size, which may be auto: any size will do.
    return load_launch_config(accelerate_config, processes, with_micro_batch(recipe, 1))
