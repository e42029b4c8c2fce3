"""Experiment trackers: each is switched off at its first error, so that none can end a training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftbench.common.text import first_line

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from peftbench.recipe.schema import Recipe
    from peftbench.record import HeldOutCurve
    from peftbench.training.callbacks import StepInfo

_PROJECT = "peftbench"
_RUN_NAME_KEYS = {"wandb": "name", "mlflow": "run_name", "clearml": "task_name", "swanlab": "experiment_name"}
"""The argument of a tracker with the name of a run. TensorBoard writes to the run's folder."""
_NAME_SETTERS: dict[str, Callable[[Any, str], object]] = {
    "comet_ml": lambda experiment, name: experiment.set_name(name),
    "aim": lambda run, name: setattr(run, "name", name),
}
"""Sets the run's name after the start."""


class Trackers:
    """The trackers of one run, through accelerate. A step and evaluation callback; logs losses and learning rate."""

    def __init__(self, recipe: Recipe, run_dir: Path, notes: list[str], *, is_main: bool) -> None:
        """Start the recipe's trackers and log the recipe. What is switched off is added to ``notes``."""
        self.recipe, self.run_dir, self.notes, self.is_main = recipe, run_dir, notes, is_main
        self._step = 0
        self._trackers: dict[str, GeneralTracker] = {}
        for name in recipe.trackers:
            self._call(name, self._start)

    def after_step(self, info: StepInfo) -> None:
        """Log one step."""
        self._step = info.step
        self._log({"loss": info.loss, "learning_rate": info.learning_rate})

    def after_evaluation(self, curve: HeldOutCurve) -> None:
        """Log one evaluation."""
        point = curve.points[-1]
        self._log({"held_out_loss": point.loss, **{f"held_out_{name}": mean for name, mean in point.metrics.items()}})

    def _log(self, values: dict[str, float]) -> None:
        for name in list(self._trackers):
            self._call(name, lambda name: self._trackers[name].log(values, step=self._step))

    def finish(self) -> None:
        """End the trackers."""
        for name in list(self._trackers):
            self._call(name, lambda name: self._trackers[name].finish())
        self._trackers.clear()

    def _start(self, name: str) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        run = self.recipe.name
        arguments = {_RUN_NAME_KEYS[name]: run} if name in _RUN_NAME_KEYS else {}
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        folder = (str(self.run_dir),) if kind.requires_logging_directory else ()
        tracker: GeneralTracker = kind(_PROJECT, *folder, **arguments)
        tracker.start()
        if name in _NAME_SETTERS and self.is_main:
            _NAME_SETTERS[name](tracker.tracker, run)
        self._trackers[name] = tracker
        tracker.store_init_configuration({"recipe": self.recipe.model_dump_json()})

    def _call(self, name: str, action: Callable[[str], None]) -> None:
        try:
            action(name)
        except Exception as error:  # of any library: a full disk, a lost connection
            self._trackers.pop(name, None)
            reason = first_line(error) or type(error).__name__
            note = f"the tracker {name} was switched off after step {self._step}: {reason}"
            self.notes.append(note)
            sys.stderr.write(f"warning: {note}\n")
