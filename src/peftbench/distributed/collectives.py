"""What ranks do one after another, refuse together, and know of each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from accelerate.utils import broadcast_object_list, gather_object

from peftbench.errors import PeftbenchError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def main_process_first(accelerator: Accelerator, fn: Callable[[], T]) -> T:
    """``work`` on the main process, then on the others, which find what it left in caches.

    Raises:
        PeftbenchError: the main process cannot do it; every rank raises the same, and none waits for another.
    """
    made: list[T] = []
    broadcast_from_main(accelerator, lambda: made.append(fn()))  # whose result may be too much to send
    return made[0] if accelerator.is_main_process else fn()


def broadcast_from_main(accelerator: Accelerator, fn: Callable[[], T]) -> T:
    """What ``work`` gives on the main process, on all of them.

    Raises:
        PeftbenchError: the main process cannot do it; every rank raises the same.
    """
    result: T | PeftbenchError | None = None
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


def all_gather_objects(accelerator: Accelerator, value: T) -> list[T]:
    """What each rank has, by rank."""
    found: list[T] = gather_object([value]) if accelerator.num_processes > 1 else [value]
    return found
