"""A step callback that keeps what it receives."""

from __future__ import annotations

from peftbench.training.callbacks import StepInfo


class StepRecorder:
    """Keeps the info of every step."""

    def __init__(self) -> None:
        self.infos: list[StepInfo] = []

    def after_step(self, info: StepInfo) -> None:
        """Keep ``info``."""
        self.infos.append(info)
