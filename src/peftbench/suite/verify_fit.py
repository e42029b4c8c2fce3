"""Verify a search result by running it: the largest micro-batch must fit and the next larger one must not."""

from __future__ import annotations

from collections.abc import Callable
from tempfile import TemporaryDirectory

from peftbench.common.units import format_bytes
from peftbench.errors import BudgetError
from peftbench.memory.devices import UNKNOWN_DEVICE, DeviceFacts
from peftbench.memory.plan import Strategy, Verification
from peftbench.memory.search import MemoryTarget, apply_strategy, list_micro_batch_sizes
from peftbench.recipe.schema import Budget, Checkpoint, Profile, Recipe
from peftbench.record import RunRecord, read_record
from peftbench.run_dir.layout import RunDir
from peftbench.suite.launch import RunResult

_VERIFICATION_STEPS = 3
"""Optimizer states exist from the second step on; the third step is representative of all later ones."""


def check_local_device(facts: DeviceFacts) -> None:
    """Check that this machine has the device that the answer is for.

    Raises:
        BudgetError: it has another device.
    """
    import torch

    local_device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if facts.torch_name != local_device and not (facts is UNKNOWN_DEVICE and local_device != "CPU"):
        hint = "give --device cpu" if local_device == "CPU" else "leave --device out"
        raise BudgetError(f"--verify runs on {local_device}, but the answer is for {facts.torch_name}; {hint}")


def verify_strategy(
    recipe: Recipe,
    strategy: Strategy,
    target: MemoryTarget,
    *,
    launch: Callable[[Recipe], RunResult],
    log_message: Callable[[str], None],
) -> Verification:
    """Run ``strategy`` on ``recipe`` with the predicted micro-batch and the next larger one, under the target's budget.

    If the first is out of memory, try smaller ones; if the second fits, try larger ones, until the limit is found.
    Each run has three training steps at the maximum sequence length and one evaluation batch. ``launch`` starts a run.

    Raises:
        BudgetError: a run ended neither well nor out of memory.
    """
    chosen, predicted = apply_strategy(recipe, strategy), strategy.plan.micro_batch_size
    sizes = list_micro_batch_sizes(chosen, target.launch_config.dp_world_size)
    outcomes: dict[int, str] = {}

    def fits(index: int) -> bool:
        with TemporaryDirectory(prefix="peftbench-") as folder:
            record = _run_and_read_record(
                _build_short_recipe(
                    chosen, strategy.plan.sequence_length, sizes[index], target.required_budget, folder
                ),
                launch,
            )
        outcomes[sizes[index]] = record.outcome.kind
        log_message(_describe_outcome(sizes[index], record))
        return record.outcome.kind == "ok"

    index = sizes.index(predicted)
    if fits(index):
        while index + 1 < len(sizes) and fits(index + 1):
            index += 1
    else:
        index -= 1
        while index >= 0 and not fits(index):
            index -= 1
    return Verification(
        predicted_micro_batch_size=predicted,
        outcome_by_micro_batch_size=outcomes,
        largest_micro_batch_size=sizes[index] if index >= 0 else None,
    )


def _run_and_read_record(recipe: Recipe, launch: Callable[[Recipe], RunResult]) -> RunRecord:
    result = launch(recipe)
    if result.outcome not in {"ok", "oom"}:
        size = recipe.train.resolved_micro_batch_size
        raise BudgetError(f"cannot verify micro-batch {size}: the run ended as {result.outcome}: {result.error}")
    return read_record(RunDir.from_recipe(recipe).record_file)


def _build_short_recipe(recipe: Recipe, width: int, micro_batch_size: int, budget: int, output_dir: str) -> Recipe:
    split, batch = recipe.evaluate.split, recipe.evaluate.batch_size
    examples = min(getattr(recipe.data, split) or batch, batch)
    changes = {
        "schedule": {"warmup_steps": 0},  # it must be shorter than the training
        "train": {"steps": _VERIFICATION_STEPS, "epochs": None, "micro_batch_size": micro_batch_size},
        "data": {"padding": "max_length", "pad_to_multiple_of": 1, "max_length": width, split: examples},
        "evaluate": {"saved_samples": 0},
    }
    parts = {name: getattr(recipe, name).model_copy(update=change) for name, change in changes.items()}
    return recipe.model_copy(
        update=parts
        | {
            "budget": Budget(memory=str(budget)),
            "profile": Profile(untimed_steps=1),
            "checkpoint": Checkpoint(),
            "trackers": (),
            "save_model": False,
            "output_dir": output_dir,
        }
    )


def _describe_outcome(micro_batch_size: int, record: RunRecord) -> str:
    outcome = record.outcome
    if outcome.kind == "ok":
        return f"micro-batch {micro_batch_size}: fits"
    where = f"step {outcome.step}, {outcome.step_part}" if outcome.step else str(outcome.phase)
    request = f", requesting {format_bytes(outcome.requested_bytes)} more" if outcome.requested_bytes else ""
    return f"micro-batch {micro_batch_size}: out of memory in {where}{request}"
