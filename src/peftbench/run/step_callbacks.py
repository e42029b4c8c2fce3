"""The step callback that reports the progress of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftbench.run_dir.status import StatusWriter
    from peftbench.training.callbacks import StepInfo


class StatusCallback:
    """Updates the run's status file."""

    def __init__(self, status_writer: StatusWriter) -> None:
        self.status_writer = status_writer

    def after_step(self, info: StepInfo) -> None:
        """Write the status, at most every few seconds."""
        self.status_writer.update_step(info.step, info.total_steps, info.real_tokens, info.loss)
