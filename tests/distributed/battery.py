"""Run combinations of the compatibility table, one after another, in the processes that a launcher started.

``python -m accelerate.commands.launch --config_file F tests/distributed/battery.py FOLDER BASE DATA ENGINE NAME...``

Each writes FOLDER/ENGINE/NAME/record.json and its trained weights, or the traceback of a failure.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState

import peftbench.run.trained_model
from peftbench.data.sources import Files
from peftbench.distributed.compatibility import Combination
from peftbench.distributed.engines import ENGINES, EngineKind
from peftbench.distributed.sharding import full_weights
from peftbench.methods import METHOD_FAMILIES, METHODS
from peftbench.methods.base import Method
from peftbench.methods.peft_kinds import TYPES
from peftbench.optim import OPTIMIZERS
from peftbench.recipe.schema import Checkpoint, Data, Evaluate, Model, Profile, Recipe, Schedule, Train
from peftbench.run.runner import Run
from peftbench.tasks.summarization import Summarization
from peftbench.training.checkpoint import CheckpointManager
from tests.helpers.peft_types import COMPUTED, build_method
from tests.helpers.short_runs import freeze_imported_objects, use_small_matmul
from tests.helpers.training import reset_accelerators

STEPS = 6
REFUSED = "refused.txt"
UNTRAINED = "untrained"
"""Name in place of an optimizer's: SGD with a learning rate so small that the weights do not change."""
RESUMED = "-resumed"
LINEAR = torch.nn.functional.linear
_running: list[Combination] = []
METHOD_KEYS: dict[str, dict[str, object]] = {"lora": {"r": 4}, "prompt_tuning": {"num_virtual_tokens": 5}}
"""Keys of the method that represents a family."""
LEARNING_RATES = {
    "sgd": 0.3,
    "lion": 1e-4,
    "lion8bit": 1e-4,
    "adafactor": 5e-2,
    "apollo": 1e-2,
    "adamw_bf16": 3e-3,
    "galore": 1e-2,
    "muon": 1e-2,
    "lora_plus": 1e-3,
}
OPTIMIZER_KEYS: dict[str, dict[str, object]] = {
    "galore": {"rank": 8, "update_gap": 3},
    "apollo": {"rank": 8, "update_gap": 3},
    "lisa": {"num_blocks": 1, "interval": 2},
}


def build_recipe(point: Combination, base: str, data: str, folder: Path) -> Recipe:
    """Return a recipe of a short training with accumulation, clipping and a schedule on the small corpus."""
    if point.optimizer == UNTRAINED:
        rate, kind = 1e-30, "sgd"
    else:
        rate, kind = LEARNING_RATES.get(point.optimizer, 3e-3), point.optimizer
    return Recipe(
        name=point.name,
        output_dir=str(folder / point.engine),
        model=Model(path=base),
        method=_build_method(point.method),
        data=Data(
            source=Files(
                id="id", train=f"{data}/train.jsonl", validation=f"{data}/validation.jsonl", test=f"{data}/test.jsonl"
            ),
            max_length=48,
        ),
        task=Summarization(separator=" TL;DR:"),
        optimizer=OPTIMIZERS[kind](learning_rate=rate, weight_decay=0.01, **OPTIMIZER_KEYS.get(point.optimizer, {})),
        schedule=Schedule(kind="constant" if OPTIMIZERS[kind].averages_weights else "linear", warmup_steps=2),
        train=Train(steps=STEPS, global_batch_size=8, micro_batch_size=2, precision=point.precision),  # type: ignore[arg-type]
        evaluate=Evaluate(metrics=(), max_new_tokens=8, batch_size=3, split="validation"),
        profile=Profile(untimed_steps=2),
    )


def _build_method(name: str) -> Method:
    """Return the method of a type of peft, or the one that represents a family."""
    if name in {*TYPES, *COMPUTED}:
        return build_method(name)
    return METHODS[METHOD_FAMILIES[name][0]](**METHOD_KEYS.get(name, {}))


def describe_dtypes(model: torch.nn.Module) -> str:
    """Return the types of frozen and of trained weights and of buffers, as the engine holds them between steps."""
    weights = [(p.requires_grad, getattr(p, "ds_tensor", p).dtype) for p in model.parameters()]
    names = {
        "frozen": {dtype for is_trained, dtype in weights if not is_trained},
        "trained": {dtype for is_trained, dtype in weights if is_trained},
    }
    return " ".join(f"{name}={','.join(sorted(map(str, dtypes)))}" for name, dtypes in names.items())


def record_weight_digests(folder: Path, engine: str) -> None:
    """Make every process append the types of its weights, and their hash if it holds full ones, after each training."""

    def hash_and_gather(
        kind: EngineKind, model: torch.nn.Module, *, on_this_rank: bool
    ) -> contextlib.AbstractContextManager[None]:
        with (folder / engine / f"dtypes-{os.environ.get('RANK', '0')}").open("a", encoding="utf-8") as file:
            file.write(f"{_running[-1].name} {describe_dtypes(model)}\n")
        if not kind.shards_weights:
            digest = hashlib.blake2b(digest_size=16)
            for parameter in model.parameters():
                digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
            digest_file = folder / engine / f"weights-{os.environ.get('RANK', '0')}"
            with digest_file.open("a", encoding="utf-8") as file:
                file.write(f"{digest.hexdigest()}\n")
        return full_weights(kind, model, on_this_rank=on_this_rank)

    setattr(peftbench.run.trained_model, "full_weights", hash_and_gather)  # noqa: B010 — it imports this name


def run_stopped_and_resumed(recipe: Recipe) -> None:
    """Repeat the training, stop it right after a checkpoint, and resume it."""
    repeated = recipe.model_copy(
        update={"name": f"{recipe.name}{RESUMED}", "checkpoint": Checkpoint(interval=STEPS // 2)}
    )
    save = CheckpointManager.save

    def save_and_stop(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    CheckpointManager.save = save_and_stop  # type: ignore[assignment,method-assign]
    try:
        run_fresh_process()
        record, _ = Run(repeated).execute()
        assert record.outcome.kind == "preempted"
    finally:
        CheckpointManager.save = save  # type: ignore[assignment,method-assign]
    run_fresh_process()
    Run(repeated).execute()


def run_fresh_process() -> None:
    """Reset the global state that a new process would not have."""
    reset_accelerators()
    torch.nn.functional.linear = LINEAR  # ZeRO stage 3 replaces it globally


def run_combination(folder: Path, base: str, data: str, point: Combination) -> None:
    """Run one combination, then once more with a stop and a resume. Write the traceback of a failure."""
    run_fresh_process()
    recipe = build_recipe(point, base, data, folder)
    _running.append(point)
    try:
        Run(recipe).execute()
        if point.optimizer != UNTRAINED and not ENGINES[point.engine].offloads_to_nvme:
            run_stopped_and_resumed(recipe)
    except Exception:
        run_dir = folder / point.engine / recipe.name
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / f"{os.environ.get('RANK', '0')}-{REFUSED}").write_text(traceback.format_exc(), encoding="utf-8")


def main() -> None:
    """Run the combinations named on the command line."""
    torch.set_num_threads(1)
    # A run destroys the process group at its end, but the next run of this process needs it.
    PartialState.destroy_process_group = lambda *_: None  # type: ignore[assignment,method-assign]
    folder, base, data, engine, *names = sys.argv[1:]
    record_weight_digests(Path(folder), engine)
    with use_small_matmul():
        for name in names:
            method, optimizer, precision = name.split("-")
            run_combination(Path(folder), base, data, Combination(method, engine, optimizer, precision))
            freeze_imported_objects()


if __name__ == "__main__":
    main()
