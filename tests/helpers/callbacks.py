"""A step callback that stores the results of each step."""

from __future__ import annotations

from peftbench.training.callbacks import StepInfo


class StepRecorder:
    """Stores the results of each step in ``infos``."""

    def __init__(self) -> None:
        self.infos: list[StepInfo] = []

    def after_step(self, info: StepInfo) -> None:
        """Store ``info``."""
        self.infos.append(info)
