"""peftbench's arm: a recipe and peftbench's Run and loop; only data and clock belong to the benchmark."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

import torch
from clock import StepClock
from examples import TASK, Examples
from spec import CASES, Job, own_settings
from trained import COUNTED_STEP, Trained, method_of

from peftbench.common.filesystem import cache_dir
from peftbench.data.sources import Files
from peftbench.errors import PeftbenchError
from peftbench.optim import AdamW
from peftbench.recipe.schema import Data, Evaluate, Model, Profile, Recipe, Train
from peftbench.record import RunRecord
from peftbench.run.runner import Run
from peftbench.run.stages import adapt_model
from peftbench.training.build import load_base_model

if TYPE_CHECKING:
    from datasets import Dataset

    from peftbench.training.callbacks import StepInfo


class TimedRun(Run):
    """A run that is trained and measured as usual, without evaluation."""

    def __init__(
        self, recipe: Recipe, rows: Dataset, data_fingerprint: str, pad_token_id: int, clock: StepClock
    ) -> None:
        super().__init__(recipe, step_callbacks=[ClockCallback(clock)])
        self.rows, self.data_fingerprint, self.pad_token_id = rows, data_fingerprint, pad_token_id

    def run_stages(self) -> None:
        """Load, build and train."""
        state = self.state
        state.data_fingerprint = self.data_fingerprint
        self.oom_handler.enforce_budget(state.probe.memory_meter)
        with state.probe.phase("load"):
            base_model = load_base_model(state.recipe)
        with state.probe.phase("build"):
            adapted_model = adapt_model(state, base_model)
        state.set_example_counts("train", len(self.rows), 0)
        self.train(adapted_model, self.rows, pad_token_id=self.pad_token_id)


class ClockCallback:
    """Stops the benchmark's clock after every step, after all other callbacks."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def after_step(self, _info: StepInfo) -> None:
        """Notify the clock."""
        self.clock.step_ended()


def recipe_of(job: Job, folder: str, positions: int) -> Recipe:
    """Return the recipe: the shared settings, and peftbench's defaults for the rest."""
    spec = job.spec
    return Recipe(
        name=CASES[job.case].method,
        output_dir=folder,
        model=Model(path=job.base, dropout=spec.dropout, dtype="fp32"),  # the peers' base
        method=method_of(job),
        task=TASK,
        data=Data(source=Files(train=job.train), max_length=positions - spec.num_virtual_tokens),
        optimizer=AdamW(learning_rate=spec.learning_rate, weight_decay=spec.weight_decay),
        train=Train(
            steps=spec.total_steps(job.case),
            global_batch_size=spec.batch,
            precision=spec.precision,
            max_grad_norm=spec.max_grad_norm,
            seed=spec.seed,
            **own_settings(job.case, spec),
        ),
        evaluate=Evaluate(metrics=()),
        profile=Profile(untimed_steps=spec.untimed_steps(job.case)),
        save_model=False,
    )


def run(job: Job, examples: Examples, positions: int) -> Trained:
    """Train and return the measurements.

    Raises:
        PeftbenchError: the outcome is not ok.
    """
    spec = job.spec
    clock = StepClock(torch.device(spec.device), spec.untimed_steps(job.case), spec.total_steps(job.case))
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(job, folder, positions)
        done = TimedRun(recipe, examples.dataset(), examples.fingerprint, examples.end, clock)
        record, _ = done.execute()
    if record.outcome.kind != "ok":
        raise PeftbenchError(f"{job.case}, {job.arm}: {record.outcome.kind}: {record.outcome.error}")
    token_counts = done.state.progress.step_token_counts
    cost = done.state.training.flop_cost if done.state.training else None
    counted = record.flops.counted_step
    model_flops = (
        cost.compute_model_flops(examples.count_flop_units(COUNTED_STEP - 1, recipe.method.virtual_tokens))
        if cost
        else None
    )
    assert record.parameters is not None
    return Trained(
        losses=record.step_losses,
        step_seconds=clock.step_seconds,
        seconds=clock.seconds,
        real_tokens=tuple(counts.real for counts in token_counts),
        labeled_tokens=tuple(counts.labeled for counts in token_counts),
        memory=record.memory["train"],
        model_flops=model_flops,
        hardware_flops=counted.counted_flops if counted else None,
        trainable_parameters=record.parameters.trainable,
        model_fingerprint=str(record.model_fingerprint),
        settings=_without_paths(record),
        notes=tuple(note.replace(str(cache_dir()), "$PEFTBENCH_CACHE") for note in record.notes),
    )


def _without_paths(record: RunRecord) -> dict[str, Any]:
    """Return the recipe without the paths of the machine."""
    recipe = {key: value for key, value in record.recipe.items() if key not in {"output_dir", "name"}}
    recipe["model"] = {key: value for key, value in recipe["model"].items() if key not in {"path", "tokenizer"}}
    recipe["data"] = {key: value for key, value in recipe["data"].items() if key != "source"}
    return recipe
