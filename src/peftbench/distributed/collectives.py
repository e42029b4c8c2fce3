"""Operations over the ranks of a run: one after another, errors raised on all, and objects gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from accelerate.utils import broadcast_object_list, gather_object

from peftbench.errors import PeftbenchError

if TYPE_CHECKING:
    from accelerate import Accelerator

_T = TypeVar("_T")


def get_dp_rank(accelerator: Accelerator) -> int:
    """Return this process's index among those that divide the data: all of them, since no engine shares examples."""
    return int(accelerator.process_index)


def get_dp_world_size(accelerator: Accelerator) -> int:
    """Return the number of processes that divide the data."""
    return int(accelerator.num_processes)


def main_process_first(accelerator: Accelerator, fn: Callable[[], _T]) -> _T:
    """Call ``fn`` on the main process, then on the others, which read the caches that it filled.

    Raises:
        PeftbenchError: ``fn`` failed on the main process; every rank raises the same error.
    """
    results: list[_T] = []
    broadcast_from_main(accelerator, lambda: results.append(fn()))  # the result may be too large to send
    return results[0] if accelerator.is_main_process else fn()


def broadcast_from_main(accelerator: Accelerator, fn: Callable[[], _T]) -> _T:
    """Call ``fn`` on the main process and return its result on every rank.

    Raises:
        PeftbenchError: ``fn`` failed on the main process; every rank raises the same error.
    """
    result: _T | PeftbenchError | None = None
    if accelerator.is_main_process:
        try:
            result = fn()
        except PeftbenchError as error:
            result = error
    if accelerator.num_processes > 1:
        (result,) = broadcast_object_list([result])
    if isinstance(result, PeftbenchError):
        raise result
    return result  # type: ignore[return-value]


def all_gather_objects(accelerator: Accelerator, value: _T) -> list[_T]:
    """Return each rank's value, in the order of ranks."""
    values: list[_T] = gather_object([value]) if accelerator.num_processes > 1 else [value]
    return values
