"""OomHandler: enforce a memory budget, recognize an out-of-memory error, describe it and suggest what would fit."""

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
from peftbench.evaluation.metrics.selection import select_metrics
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
"""Messages of allocation failures outside of torch's CUDA allocator, which raises its own exception type."""
_OOM_MESSAGES_UNDER_LIMIT = ("could not create a ", "could not execute a primitive", "can't start new thread")
"""Messages of libraries whose allocation failed; without a memory limit they can have other causes."""


def resolve_auto_micro_batch(recipe: Recipe) -> tuple[Recipe, str | None]:
    """Replace ``train.micro_batch_size=auto`` by a number; return the recipe and a note about it.

    Runs the search in a process of its own, before the engine starts.

    Raises:
        BudgetError: there is no budget, or the memory of the recipe cannot be estimated.
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
            "train.micro_batch_size=auto needs a memory budget",
            "set budget.memory (e.g. budget.memory=8GiB) or run on a GPU",
        )
    choice = request_micro_batch(AdviceRequest.from_environment(recipe, budget, device))
    if choice.error is not None:
        raise BudgetError(f"train.micro_batch_size=auto cannot be resolved: {choice.error}")
    resolved = with_evaluation_batch(with_micro_batch(recipe, choice.micro_batch_size), choice.evaluation_batch_size)
    return resolved, choice.note


class OomHandler:
    """Memory limit and out-of-memory errors of one run on one rank."""

    def __init__(self, recipe: Recipe, device: torch.device, run_dir: Path, rank: int) -> None:
        self.recipe, self.device = recipe, device
        self.snapshot_path = RunDir(run_dir).snapshot_file(rank)
        self.memory_limit: MemoryLimit | None = None
        self.notes: list[str] = []
        self._held_bytes_at_oom: int | None = None

    def enforce_budget(self, meter: MemoryMeter) -> None:
        """Limit this process to the recipe's budget, and dump a snapshot when the CUDA allocator runs out of memory.

        With a budget, the baseline of ``meter`` is set to now, where the budget starts to count.

        Raises:
            BudgetError: the budget is invalid on this device.
        """
        self.delete_snapshot()
        if (budget := self.recipe.budget.memory_bytes) is not None:
            for metric in select_metrics(self.recipe):
                metric.import_libraries()
            self.memory_limit = limit_memory(budget, self.device, meter.cuda_context_bytes)
            meter.set_baseline()
        if self.device.type == "cuda":
            try:
                dump_on_oom(self.snapshot_path, self._record_held_bytes)
            except (RuntimeError, AttributeError, TypeError) as error:  # private API of torch
                self.notes.append(f"An out-of-memory error would leave no memory snapshot: {error}")

    @property
    def budget_bytes(self) -> int | None:
        """Memory limit of this process, in bytes: its budget, or the GPU's memory; None on CPU without a budget."""
        if (budget := self.recipe.budget.memory_bytes) is not None or self.device.type != "cuda":
            return budget
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def held_bytes(self, meter: MemoryMeter) -> int | None:
        """Return the bytes of the limit that are in use now, None if unknown.

        On a GPU: the memory of torch's allocator plus the budget's allowance for everything else or, without a budget,
        plus the CUDA context if the driver reports it. On CPU: what the budget counts or, without a budget, the growth
        of the resident set since the start of the run.
        """
        if self.memory_limit is not None:
            return (
                self.memory_limit.budget_bytes - self.memory_limit.tensor_bytes + self.memory_limit.read_in_use_bytes()
            )
        return meter.read_in_use_bytes()

    def delete_snapshot(self) -> None:
        """Delete the snapshot of an earlier run, or of a failed allocation that the run survived."""
        with suppress(OSError):
            self.snapshot_path.unlink(missing_ok=True)

    def is_oom(self, error: BaseException) -> bool:
        """True if ``error`` is an out-of-memory error."""
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, OSError):
            return error.errno == errno.ENOMEM
        messages = (*_OOM_MESSAGES, *(_OOM_MESSAGES_UNDER_LIMIT if self.memory_limit else ()))
        return isinstance(error, RuntimeError) and any(message in str(error) for message in messages)

    def build_outcome(self, error: BaseException, position: dict[str, Any], rank: int | None) -> Outcome:
        """Return the outcome of an out-of-memory error, and release the limit, so that a record can be written."""
        in_use_bytes = self._held_bytes_at_oom
        if self.memory_limit is not None:
            # The frames of the traceback still reference most of the tensors.
            in_use_bytes = self.memory_limit.read_in_use_bytes() if in_use_bytes is None else in_use_bytes
            self.memory_limit.release()
        if self.device.type == "cuda" and not isinstance(error, torch.OutOfMemoryError):
            dump_snapshot(self.snapshot_path)  # the allocator did not fail, so its observer was not called
        return Outcome(
            kind="oom",
            **position,
            rank=rank,
            requested_bytes=_parse_requested_bytes(error),
            in_use_bytes=in_use_bytes,
            error=first_line(error),
            memory_snapshot=self.snapshot_path.name if self.snapshot_path.exists() else None,
        )

    def release_limit(self) -> None:
        """Release the memory limit."""
        if self.memory_limit is not None:
            self.memory_limit.release()

    def with_advice(self, outcome: Outcome) -> Outcome:
        """Return ``outcome`` with the estimated memory need and a suggestion that is predicted to fit."""
        advice = self._request_advice(outcome.phase)
        if advice is None:
            return outcome
        if advice.error:
            self.notes.append(f"No suggestion: {advice.error}")
        return outcome.model_copy(
            update={
                "estimated_peak_bytes": advice.estimated_peak_bytes,
                "suggestion": advice.suggestion,
                "suggested_overrides": advice.overrides,
            }
        )

    def _request_advice(self, phase: str | None) -> Advice | None:
        cuda, budget = self.device.type == "cuda", self.budget_bytes
        device = torch.cuda.get_device_properties(self.device).name if cuda else "cpu"
        # On CPU without a budget the machine itself ran out of memory, and nothing is known about its limit.
        if budget is None:
            return None
        return request_advice(AdviceRequest.from_environment(self.recipe, budget, device, phase))

    def _record_held_bytes(self) -> None:
        self._held_bytes_at_oom = int(torch.cuda.memory_allocated(self.device))


def _parse_requested_bytes(error: BaseException) -> int | None:
    """Return the size in an allocator's message: "Tried to allocate 2.00 GiB" (CUDA), "allocate N bytes" (CPU)."""
    if exact := re.search(r"allocate (\d+) bytes", str(error)):
        return int(exact.group(1))
    if rounded := re.search(r"Tried to allocate ([\d.]+) ([KMG])iB", str(error)):
        return int(float(rounded.group(1)) * 1024 ** (" KMG".index(rounded.group(2))))
    return None
