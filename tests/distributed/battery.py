"""Runs combinations of the compatibility table, one after another, in the processes that a launcher started.

``python -m accelerate.commands.launch --config_file F tests/distributed/battery.py FOLDER BASE DATA ENGINE NAME...``

Each writes FOLDER/ENGINE/NAME/record.json and its trained weights, or the traceback of a failure.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState

import peftbench.run.stages
from peftbench.data.sources import Files
from peftbench.distributed.compatibility import Combination
from peftbench.distributed.engines import ENGINES, EngineKind
from peftbench.distributed.sharding import gather_full_model
from peftbench.methods import METHODS
from peftbench.optim import OPTIMIZERS
from peftbench.recipe.schema import Checkpoint, Data, Evaluate, Model, Profile, Recipe, Schedule, Train
from peftbench.run.runner import Run
from peftbench.training.checkpoint import CheckpointManager
from tests.helpers.training import forget_accelerators

STEPS = 6
REFUSED = "refused.txt"
UNTRAINED = "untrained"
"""Instead of an optimizer: SGD with steps so small that the weights do not change."""
RESUMED = "-resumed"
LINEAR = torch.nn.functional.linear
KNOBS: dict[str, dict[str, object]] = {"lora": {"r": 4}, "prompt_tuning": {"num_virtual_tokens": 5}}
RATES = {
    "sgd": 0.3,
    "lion": 1e-4,
    "lion8bit": 1e-4,
    "adafactor": 5e-2,
    "apollo": 1e-2,
    "adamw_bf16": 3e-3,
    "galore": 1e-2,
}
MORE: dict[str, dict[str, object]] = {"galore": {"rank": 8, "update_gap": 3}, "apollo": {"rank": 8, "update_gap": 3}}


def recipe(point: Combination, base: str, data: str, folder: Path) -> Recipe:
    """A short training with accumulation, clipping and a schedule over the small corpus."""
    if point.optimizer == UNTRAINED:
        rate, kind = 1e-30, "sgd"
    else:
        rate, kind = RATES.get(point.optimizer, 3e-3), point.optimizer
    return Recipe(
        name=point.name,
        output_dir=str(folder / point.engine),
        model=Model(path=base),
        method=METHODS[point.method](**KNOBS.get(point.method, {})),
        data=Data(
            source=Files(
                id="id", train=f"{data}/train.jsonl", validation=f"{data}/validation.jsonl", test=f"{data}/test.jsonl"
            ),
            max_length=48,
            separator=" TL;DR:",
        ),
        optimizer=OPTIMIZERS[kind](learning_rate=rate, weight_decay=0.01, **MORE.get(point.optimizer, {})),
        schedule=Schedule(kind="linear", warmup_steps=2),
        train=Train(steps=STEPS, global_batch_size=8, micro_batch_size=2, precision=point.precision),  # type: ignore[arg-type]
        evaluate=Evaluate(generate=False, max_new_tokens=8, batch_size=3, split="validation"),
        profile=Profile(untimed_steps=2),
    )


def keep_digests(folder: Path, engine: str) -> None:
    """Make every process append the hash of its weights to a file after each training, if it holds full weights."""

    def hash_and_gather(kind: EngineKind, prepared_model: Any, model: torch.nn.Module, *, on_this_rank: bool) -> None:
        if not kind.shards_weights:
            digest = hashlib.blake2b(digest_size=16)
            for parameter in model.parameters():
                digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
            place = folder / engine / f"weights-{os.environ.get('RANK', '0')}"
            with place.open("a", encoding="utf-8") as file:
                file.write(f"{digest.hexdigest()}\n")
        gather_full_model(kind, prepared_model, model, on_this_rank=on_this_rank)

    setattr(peftbench.run.stages, "gather_full_model", hash_and_gather)  # noqa: B010 — a name that it imports


def stopped_and_resumed(made: Recipe) -> None:
    """Repeat the training, stop it right after a checkpoint, and resume it."""
    again = made.model_copy(update={"name": f"{made.name}{RESUMED}", "checkpoint": Checkpoint(interval=STEPS // 2)})
    save = CheckpointManager.save

    def saved_and_stopped(*given: Any) -> None:
        save(*given)
        raise KeyboardInterrupt

    CheckpointManager.save = saved_and_stopped  # type: ignore[assignment,method-assign]
    try:
        fresh_process()
        record, _ = Run(again).execute()
        assert record.outcome.kind == "preempted"
    finally:
        CheckpointManager.save = save  # type: ignore[assignment,method-assign]
    fresh_process()
    Run(again).execute()


def fresh_process() -> None:
    """Reset what a new process would not have."""
    forget_accelerators()
    torch.nn.functional.linear = LINEAR  # ZeRO stage 3 replaces it for the rest of the process


def main() -> None:
    """Run the combinations named on the command line."""
    torch.set_num_threads(1)
    # A run destroys the process group; here the next run uses it.
    PartialState.destroy_process_group = lambda *_: None  # type: ignore[assignment,method-assign]
    folder, base, data, engine, *names = sys.argv[1:]
    keep_digests(Path(folder), engine)
    for name in names:
        method, optimizer, precision = name.split("-")
        point = Combination(method, engine, optimizer, precision)
        fresh_process()
        made = recipe(point, base, data, Path(folder))
        try:
            Run(made).execute()
            if optimizer != UNTRAINED and not ENGINES[engine].offloads_to_nvme:
                stopped_and_resumed(made)
        except Exception:
            place = Path(folder) / engine / name
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{os.environ.get('RANK', '0')}-{REFUSED}").write_text(traceback.format_exc(), encoding="utf-8")


if __name__ == "__main__":
    main()
