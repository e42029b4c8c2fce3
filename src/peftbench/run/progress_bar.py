"""ProgressBar: one line on the terminal, updated after every training step."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from peftbench.common.units import format_bytes

if TYPE_CHECKING:
    from peftbench.record import HeldOutCurve
    from peftbench.training.callbacks import StepInfo

_RATE_WINDOW_STEPS = 20
"""Number of latest steps over which tokens per second is averaged."""
_BAR_FORMAT = "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}, {remaining} left"
_RESERVED_COLUMNS = 68
"""Columns that everything except the name usually takes, with a bar of one column."""


class ProgressBar:
    """Step, losses, real tokens per second, memory and time left of one training. A callback and a context manager.

    Writes nothing and reads no memory if standard error is not a terminal.
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
        """Show the bar if ``enabled``; ``read_memory_bytes`` returns the bytes that count against the budget."""
        self._read_memory_bytes, self._budget_bytes = read_memory_bytes, budget_bytes
        # dynamic_ncols keeps it on one line when the terminal is resized; tqdm truncates a line that is too long.
        self._bar = tqdm(
            total=total_steps,
            initial=completed_steps,
            desc=shorten_name(name, _get_terminal_columns() - _RESERVED_COLUMNS),
            bar_format=_BAR_FORMAT,
            dynamic_ncols=True,
            miniters=1,
            disable=None if enabled else True,
        )
        self._held_out_loss: float | None = None
        self._token_history: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=_RATE_WINDOW_STEPS + 1)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def after_step(self, info: StepInfo) -> None:
        """Advance by one step."""
        if self._bar.disable:
            return
        self._token_history.append((time.monotonic(), info.real_tokens))
        (start, _), *later = self._token_history
        rate = sum(tokens for _, tokens in later) / max(later[-1][0] - start, 1e-9)
        self._bar.set_postfix_str(
            format_metrics(info.loss, rate, self._read_memory_bytes(), self._budget_bytes, self._held_out_loss),
            refresh=False,
        )
        self._bar.update()

    def after_evaluation(self, curve: HeldOutCurve) -> None:
        """Show the last held-out loss from the next step on; its duration is in no rate."""
        self._held_out_loss = curve.points[-1].loss
        pause = curve.points[-1].seconds
        shifted = [(seconds + pause, tokens) for seconds, tokens in self._token_history]
        self._token_history = deque(shifted, maxlen=self._token_history.maxlen)


def format_metrics(
    loss: float,
    tokens_per_second: float,
    memory_bytes: int | None,
    budget_bytes: int | None,
    held_out_loss: float | None = None,
) -> str:
    """Return the text after the bar: losses in nats, real tokens per second, memory and budget."""
    memory = "memory unknown" if memory_bytes is None else format_bytes(memory_bytes, budget_bytes)
    held_out = "" if held_out_loss is None else f", held-out {held_out_loss:.3f}"
    return f"loss {loss:.3f}{held_out}, {tokens_per_second:,.0f} tokens/s, {memory}"


def shorten_name(name: str, max_columns: int) -> str:
    """Keep the end of a name, where runs of a suite differ; at least 12 columns."""
    max_columns = max(max_columns, 12)
    return name if len(name) <= max_columns else f"…{name[1 - max_columns :]}"


def _get_terminal_columns() -> int:
    with suppress(OSError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns
    return 80
