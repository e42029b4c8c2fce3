"""While a run trains: one line on the terminal, renewed after its steps."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from tqdm.auto import tqdm

from peftbench.common.units import format_bytes

_RATE_WINDOW_STEPS = 20
"""Steps that tokens per second are of."""
_BAR_FORMAT = "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}, {remaining} left"
_RESERVED_COLUMNS = 68
"""Columns that all but the name usually takes, with a bar of one."""


class ProgressBar:
    """Step, loss, real tokens per second, memory and time left of one training; leaving it ends the line.

    Nothing is written, and nothing looked up, where standard error is no terminal.
    """

    def __init__(
        self,
        name: str,
        completed_steps: int,
        total_steps: int,
        *,
        read_memory_bytes: Callable[[], int | None],
        budget_bytes: int | None,
        enabled: bool,
    ) -> None:
        """A run of that name begins with ``step`` of its ``steps`` done; ``shown`` is false on all ranks but one.

        ``memory`` tells the bytes that stand against the budget.
        """
        self._read_memory_bytes, self._budget_bytes = read_memory_bytes, budget_bytes
        # A width that follows the terminal's keeps it one line; tqdm cuts what is too long where there is a bar.
        self._bar = tqdm(
            total=total_steps,
            initial=completed_steps,
            desc=shorten_name(name, _get_terminal_columns() - _RESERVED_COLUMNS),
            bar_format=_BAR_FORMAT,
            dynamic_ncols=True,
            miniters=1,
            disable=None if enabled else True,
        )
        self._token_history: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=_RATE_WINDOW_STEPS + 1)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, loss: float, real_tokens: int) -> None:
        """Another step is done, with that loss and so many real tokens over all ranks."""
        if self._bar.disable:
            return
        self._token_history.append((time.monotonic(), real_tokens))
        (began, _), *later = self._token_history
        rate = sum(tokens for _, tokens in later) / max(later[-1][0] - began, 1e-9)
        self._bar.set_postfix_str(
            format_metrics(loss, rate, self._read_memory_bytes(), self._budget_bytes), refresh=False
        )
        self._bar.update()


def format_metrics(loss: float, tokens_per_second: float, memory_bytes: int | None, budget_bytes: int | None) -> str:
    """What a line says of the last steps: loss in nats, real tokens per second, memory of its budget."""
    memory = "memory unknown" if memory_bytes is None else format_bytes(memory_bytes, budget_bytes)
    return f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s, {memory}"


def shorten_name(name: str, max_columns: int) -> str:
    """A run's name in so many columns, but 12 at least; its end tells the runs of a suite apart."""
    max_columns = max(max_columns, 12)
    return name if len(name) <= max_columns else f"…{name[1 - max_columns :]}"


def _get_terminal_columns() -> int:
    with suppress(OSError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns
    return 80
