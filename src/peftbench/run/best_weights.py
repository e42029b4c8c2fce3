"""BestWeights: the trained weights with the lowest held-out loss so far, on disk."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from peftbench.run_dir.layout import get_checkpoint_step
from peftbench.training.checkpoint import CheckpointManager
from peftbench.training.state import capture_weights, load_weights

if TYPE_CHECKING:
    from peftbench.record import HeldOutCurve
    from peftbench.run.state import RunState
    from peftbench.training.build import AdaptedModel, TrainingComponents


class BestWeights:
    """Saves and restores the weights of the best evaluation of one training. An evaluation callback.

    They are on disk, since a copy in memory would count in the training's peak. A checkpoint does not contain them: the
    weights of the best step before each checkpoint are kept as long as the checkpoint is.
    """

    def __init__(
        self,
        state: RunState,
        adapted_model: AdaptedModel,
        training: TrainingComponents,
        checkpoint_manager: CheckpointManager,
    ) -> None:
        self.state, self.adapted_model, self.training = state, adapted_model, training
        self.checkpoint_manager = checkpoint_manager
        self.manager = CheckpointManager(
            state.accelerator,
            state.run_dir.path,
            checkpoint_manager.metadata,
            keep_latest=None,
            parent=state.run_dir.best_weights_dir,
        )

    def after_evaluation(self, curve: HeldOutCurve) -> None:
        """Save the weights if the last evaluation of ``curve`` is the best. Collective.

        Raises:
            OutputError: they cannot be written.
        """
        step = curve.points[-1].step
        if curve.best_step != step:
            return
        with self.state.probe.exclude_memory():
            self.manager.save(step, capture_weights(self.training, self.adapted_model.model))
        self.delete_unused(curve)

    def restore(self) -> None:
        """Load the best weights into the model, unless they are those of the last step. Collective.

        Raises:
            CheckpointError: they are missing or damaged.
        """
        state, curve = self.state, self.state.held_out_curve
        if curve is None or (step := curve.best_step) is None:
            return
        if step != state.progress.completed_steps:
            weights, _ = self.manager.load(self.manager.find(step))
            load_weights(weights, self.training, self.adapted_model.model)
        state.held_out_curve = curve.model_copy(update={"kept_step": step})
        state.notes.append(
            f"the saved and evaluated weights are those of step {step}, which has the lowest loss on the {curve.split} "
            "split (checkpoint.keep_best)"
        )

    def delete_unused(self, curve: HeldOutCurve | None) -> None:
        """Delete the weights that neither the rest of the training nor a resume from a checkpoint can restore."""
        if not self.state.accelerator.is_main_process:
            return
        checkpoint_steps = map(get_checkpoint_step, self.checkpoint_manager.list_checkpoints())
        needed = {curve.best_step, *map(curve.find_best_step, checkpoint_steps)} if curve is not None else set()
        for path in self.manager.list_checkpoints():
            if get_checkpoint_step(path) not in needed:
                shutil.rmtree(path, ignore_errors=True)

    def delete_all(self) -> None:
        """Delete all weights, since the model is saved."""
        self.manager.delete_all()
