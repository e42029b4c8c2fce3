"""The task that a file's columns imply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from peftbench.errors import OutOfRangeError
from peftbench.tasks.base import Task


class Auto(Task):
    """The first task whose columns the training split has. A run resolves it before it starts; see the record."""

    is_resolved: ClassVar[bool] = False

    kind: Literal["auto"] = "auto"
    """Kind of task."""


def select_task(names: Sequence[str], tasks: Mapping[str, type[Task]], place: str) -> Task:
    """Return the first task for the columns of ``place``.

    Raises:
        OutOfRangeError: there is none.
    """
    found = next(filter(None, (task.match(names) for task in tasks.values())), None)
    if found is not None:
        return found
    known = "; ".join(f"{kind}: {' + '.join(task.with_defaults().columns.values())}" for kind, task in tasks.items())
    raise OutOfRangeError(
        f"task.kind=auto finds no task for the columns of {place} ({', '.join(names[:20])})",
        f"set task.kind and name its columns, e.g. task.kind=completion task.prompt=COLUMN task.completion=COLUMN "
        f"(columns by task: {known})",
    )
