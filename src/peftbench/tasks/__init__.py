"""TASKS: what an example is, how it becomes tokens and labels, what is generated, and which metrics judge it.

To add a task, write a module and add a row to TASKS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from peftbench.tasks.alpaca import Alpaca
from peftbench.tasks.auto import Auto
from peftbench.tasks.base import Task
from peftbench.tasks.chat import Chat
from peftbench.tasks.choices import Choices
from peftbench.tasks.completion import Completion
from peftbench.tasks.summarization import Summarization
from peftbench.tasks.text import Text

TASKS: dict[str, type[Task]] = {
    "chat": Chat,
    "completion": Completion,
    "alpaca": Alpaca,
    "choices": Choices,
    "text": Text,
    "summarization": Summarization,
}
"""Value of ``task.kind``: the task's class. Columns are matched in this order (see :mod:`peftbench.tasks.auto`)."""

TASK_KINDS: dict[str, type[Task]] = {"auto": Auto, **TASKS}
"""Every value of ``task.kind``."""

if TYPE_CHECKING:
    AnyTask = Task
else:
    AnyTask = Annotated[Union[tuple(TASK_KINDS.values())], Field(discriminator="kind")]
