"""Evaluation during training, outside of every measurement of it, and what follows from its results."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from peftbench.distributed.deepspeed import unwrap_optimizer
from peftbench.distributed.sharding import release_gathered_weights
from peftbench.record import HeldOutCurve, HeldOutPoint
from peftbench.run.evaluators import compute_metric_means
from peftbench.training.data import INTERVAL_SPLIT
from peftbench.training.state import preserve_rng_state

if TYPE_CHECKING:
    from peftbench.evaluation.evaluator import Evaluator
    from peftbench.recipe.schema import EarlyStopping
    from peftbench.run.state import RunState
    from peftbench.training.callbacks import EvaluationCallback, StepInfo
    from peftbench.training.loop import TrainProgress


class IntervalEvaluation:
    """Adds a point to the run's held-out curve every N steps and after the last step. A step callback.

    It must be called before the checkpoint of the step is saved, which then has the point. The training is not changed:
    the states of all random number generators, the model's mode and the trained weights are restored.
    """

    def __init__(
        self, state: RunState, evaluator: Evaluator, interval_steps: int, callbacks: Sequence[EvaluationCallback]
    ) -> None:
        """Evaluate with ``evaluator`` every ``interval_steps`` steps, then call ``callbacks`` in order."""
        self.state, self.evaluator = state, evaluator
        self.interval_steps, self.callbacks = interval_steps, callbacks

    def after_step(self, info: StepInfo) -> None:
        """Evaluate if it is due. Collective.

        Raises:
            OutputError: the best weights cannot be written.
        """
        if info.step % self.interval_steps and info.step != info.total_steps:
            return
        state, training = self.state, self.state.training
        assert training is not None
        optimizer = unwrap_optimizer(training.optimizer)
        with ExitStack() as stack:
            with state.probe.excluded("evaluate") as section, preserve_rng_state():
                stack.enter_context(state.recipe.optimizer.evaluation_weights(optimizer))
                held_out = self.evaluator.compute_held_out_loss()
                has_metrics = state.recipe.evaluate.interval_metrics
                metrics = compute_metric_means(self.evaluator, state.recipe, held_out) if has_metrics else {}
                release_gathered_weights(training.model)
                state.recipe.method.set_training(self.evaluator.model)
            state.notes += [note for note in self.evaluator.notes if note not in state.notes]
            curve = state.held_out_curve or HeldOutCurve(split=INTERVAL_SPLIT, num_examples=len(self.evaluator.dataset))
            point = HeldOutPoint(step=info.step, loss=held_out.loss, seconds=section.seconds, metrics=metrics)
            state.held_out_curve = curve.with_point(point)
            for callback in self.callbacks:
                callback.after_evaluation(state.held_out_curve)


class EarlyStoppingCallback:
    """Ends the training when the held-out loss no longer falls. An evaluation callback."""

    def __init__(self, state: RunState) -> None:
        self.state = state

    def after_evaluation(self, curve: HeldOutCurve) -> None:
        """Stop after the current step, unless it is the last one, if the last evaluations showed no improvement."""
        config, state = self.state.recipe.early_stopping, self.state
        if config.patience is None or not state.progress.count_remaining_steps(state.total_steps):
            return
        state.progress.stopped_early = curve.count_without_improvement(config.min_delta) >= config.patience


def describe_early_stop(config: EarlyStopping, progress: TrainProgress, total_steps: int) -> str:
    """Return a note on a training that ended early."""
    evaluations = f"{config.patience} evaluation{'s' if config.patience != 1 else ''}"
    return (
        f"early stopping ended the training after {progress.completed_steps} of {total_steps} steps: the held-out loss "
        f"did not fall by more than {config.min_delta:g} nats in {evaluations}"
    )
