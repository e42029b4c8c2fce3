"""Running out of memory: held to a budget, found out, told to the other ranks, and answered."""

from __future__ import annotations

import errno
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftbench.common.text import first_line
from peftbench.distributed.launcher_env import runs_on_cpu
from peftbench.errors import BudgetError
from peftbench.memory.advisor import Advice, AdviceRequest, request_advice, request_micro_batch
from peftbench.memory.limit import MemoryLimit, limit_memory
from peftbench.memory.search import with_evaluation_batch, with_micro_batch
from peftbench.profiler.memory_snapshot import dump_on_oom, dump_snapshot
from peftbench.record import Outcome
from peftbench.run_dir.layout import RunDir

if TYPE_CHECKING:
    from peftbench.profiler.memory import MemoryMeter
    from peftbench.recipe.schema import Recipe

_OOM_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
    "Cannot allocate memory",
)
"""How memory is refused outside of torch's CUDA allocator, which has an exception of its own."""
_OOM_MESSAGES_UNDER_LIMIT = ("could not create a ", "could not execute a primitive", "can't start new thread")
"""How libraries say that the system gave them no memory; without a limit these can mean other things."""


def resolve_auto_micro_batch(recipe: Recipe) -> tuple[Recipe, str | None]:
    """The recipe with a number for ``train.micro_batch_size=auto``, and a note of it; before anything is started.

    Raises:
        BudgetError: it is not known what is to fit, or how much it would take.
    """
    if recipe.train.micro_batch_size != "auto":
        return recipe, None
    if not recipe.method.is_trainable:
        return with_micro_batch(recipe, 1), None
    budget, device = recipe.budget.memory_bytes, "cpu"
    if not runs_on_cpu():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        budget, device = budget or properties.total_memory, properties.name
    if budget is None:
        raise BudgetError(
            "train.micro_batch_size=auto needs to know what is to fit; set budget.memory, as budget.memory=8GiB, or run it "
            "on a GPU"
        )
    found = request_micro_batch(AdviceRequest.from_environment(recipe, budget, device))
    if found.error is not None:
        raise BudgetError(f"train.micro_batch_size=auto cannot be settled: {found.error}")
    return with_evaluation_batch(
        with_micro_batch(recipe, found.micro_batch_size), found.evaluation_batch_size
    ), found.note


class OomHandler:
    """The memory of one run on one rank: its limit, and what happens when it is not enough."""

    def __init__(self, recipe: Recipe, device: torch.device, run_dir: Path, rank: int) -> None:
        self.recipe, self.device = recipe, device
        self.snapshot_path = RunDir(run_dir).snapshot_file(rank)
        self.memory_limit: MemoryLimit | None = None
        self.notes: list[str] = []
        self._held_bytes_at_oom: int | None = None

    def enforce_budget(self, meter: MemoryMeter) -> None:
        """Hold the run to its budget, and have an out-of-memory of the GPU show who held it.

        Under a budget ``meter`` counts from here on, as the budget does.

        Raises:
            BudgetError: the budget cannot be.
        """
        self.delete_snapshot()
        if (budget := self.recipe.budget.memory_bytes) is not None:
            self.memory_limit = limit_memory(budget, self.device, meter.cuda_context_bytes)
            meter.set_baseline()
        if self.device.type == "cuda":
            try:
                dump_on_oom(self.snapshot_path, self._record_held_bytes)
            except (RuntimeError, AttributeError, TypeError) as error:  # torch's own, and free to change
                self.notes.append(f"an out-of-memory would leave no snapshot: {error}")

    @property
    def budget_bytes(self) -> int | None:
        """What this process may have: its budget, or else the GPU's memory; None on CPU without a budget."""
        if (budget := self.recipe.budget.memory_bytes) is not None or self.device.type != "cuda":
            return budget
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def held_bytes(self, meter: MemoryMeter) -> int | None:
        """What this process has of that now; None where nothing tells.

        On a GPU what torch's allocator holds, and beside it as much as a budget leaves for that, or else the context
        where the driver tells it. On CPU what a budget counts, or else what is resident beyond what was before the run.
        """
        if self.memory_limit is not None:
            return (
                self.memory_limit.budget_bytes - self.memory_limit.tensor_bytes + self.memory_limit.read_in_use_bytes()
            )
        return meter.read_in_use_bytes()

    def delete_snapshot(self) -> None:
        """Take away the snapshot of an earlier run of this name, or of a refusal that something lived with."""
        with suppress(OSError):
            self.snapshot_path.unlink(missing_ok=True)

    def is_oom(self, error: BaseException) -> bool:
        """Whether ``error`` says that there was no memory."""
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, OSError):
            return error.errno == errno.ENOMEM
        words = (*_OOM_MESSAGES, *(_OOM_MESSAGES_UNDER_LIMIT if self.memory_limit else ()))
        return isinstance(error, RuntimeError) and any(word in str(error) for word in words)

    def build_outcome(self, error: BaseException, position: dict[str, Any], rank: int | None) -> Outcome:
        """An out-of-memory; ``rank`` where there are several. Its limit is lifted, so that it can be told."""
        held = self._held_bytes_at_oom
        if self.memory_limit is not None:
            # The exception's frames hold on to most of what was there when it was raised.
            held = self.memory_limit.read_in_use_bytes() if held is None else held
            self.memory_limit.release()
        if self.device.type == "cuda" and not isinstance(error, torch.OutOfMemoryError):
            dump_snapshot(self.snapshot_path)  # it was not the allocator that refused, and so nobody has looked
        return Outcome(
            kind="oom",
            **position,
            rank=rank,
            requested_bytes=_parse_requested_bytes(error),
            in_use_bytes=held,
            error=first_line(error),
            memory_snapshot=self.snapshot_path.name if self.snapshot_path.exists() else None,
        )

    def release_limit(self) -> None:
        """Hold the run to its budget no more."""
        if self.memory_limit is not None:
            self.memory_limit.release()

    def with_advice(self, outcome: Outcome) -> Outcome:
        """With what the estimator says that it would have needed, and what would fit instead."""
        advice = self._request_advice()
        if advice is None:
            return outcome
        if advice.error:
            self.notes.append(f"no suggestion: {advice.error}")
        return outcome.model_copy(update={"needed_bytes": advice.estimated_peak_bytes, "suggestion": advice.suggestion})

    def _request_advice(self) -> Advice | None:
        cuda, budget = self.device.type == "cuda", self.budget_bytes
        device = torch.cuda.get_device_properties(self.device).name if cuda else "cpu"
        # Without a budget on CPU it is the machine that had no more, and who knows why.
        return None if budget is None else request_advice(AdviceRequest.from_environment(self.recipe, budget, device))

    def _record_held_bytes(self) -> None:
        self._held_bytes_at_oom = int(torch.cuda.memory_allocated(self.device))


def _parse_requested_bytes(error: BaseException) -> int | None:
    """What an allocator says it was asked for: CUDA's "Tried to allocate 2.00 GiB", the CPU's "allocate N bytes"."""
    if exact := re.search(r"allocate (\d+) bytes", str(error)):
        return int(exact.group(1))
    if rounded := re.search(r"Tried to allocate ([\d.]+) ([KMG])iB", str(error)):
        return int(float(rounded.group(1)) * 1024 ** (" KMG".index(rounded.group(2))))
    return None
