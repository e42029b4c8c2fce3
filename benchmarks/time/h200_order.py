"""Predict tokens/s of the four methods of GPT-2 small on an H200 by its data sheet; compare with committed records.

Run: python benchmarks/time/h200_order.py
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tabulate import tabulate
from transformers import GPT2Config

from peftbench.memory.devices import get_device_facts
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.memory.step_time import predict_time
from peftbench.methods import METHODS
from peftbench.methods.base import Method
from peftbench.recipe.schema import Data, Evaluate, Model, Recipe, Train
from peftbench.timing.prediction import StepTime

RECORDS = Path(__file__).resolve().parent.parent / "vs_trainer" / "records" / "cuda_bf16"
METHOD_NAMES = ("full", "lora", "prompt_tuning", "last_layer")


def predict(record: dict[str, Any]) -> StepTime:
    """Return the predicted time of a step whose rows have the mean length of the record's timed steps."""
    spec, untimed = record["spec"], record["untimed_steps"]
    rows = spec["batch"]
    tokens = round(statistics.mean(record["real_tokens"][untimed:]) / rows)
    labels = round(statistics.mean(record["labeled_tokens"][untimed:]) / rows)
    recipe = Recipe(
        name=record["case"],
        output_dir="",
        model=Model(path="gpt2", dropout=spec["dropout"], dtype="fp32"),
        method=_read_method(record),
        data=Data(source={"kind": "synthetic"}, max_length=tokens),
        train=Train(steps=1, global_batch_size=rows, precision=spec["precision"]),
        evaluate=Evaluate(metrics=()),
    )
    facts = get_device_facts("h200")
    with TemporaryDirectory() as folder:
        GPT2Config().save_pretrained(folder)
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": folder})})
        with MemorySimulation(recipe, facts.capability, 1, has_padding=False) as simulation:
            simulation.simulate_training(rows, tokens, labels)
    step_time, notes = predict_time(simulation.operation_log.count_step(simulation.accumulation), recipe, facts, tokens)
    if step_time is None:
        raise SystemExit("; ".join(notes))
    return step_time


def _read_method(record: dict[str, Any]) -> Method:
    """Return the method with the record's settings; defaults may have changed since."""
    settings = dict(record["settings"]["method"])
    kind = METHODS[settings.pop("kind")]
    return kind(**{key: value for key, value in settings.items() if key in kind.model_fields})


def main() -> int:
    """Print both; return 1 if the order differs or a measured value is outside of its range."""
    rows, predicted, measured, outside = [], {}, {}, False
    for name in METHOD_NAMES:
        record = json.loads((RECORDS / name / "peftbench-1.json").read_text(encoding="utf-8"))
        step_time = predict(record)
        low, high = step_time.tokens_per_second
        predicted[name] = step_time.tokens / step_time.typical_seconds
        measured[name] = sum(record["real_tokens"][record["untimed_steps"] :]) / record["train_seconds"]
        outside = outside or not low <= measured[name] <= high
        rows.append(
            {
                "method": name,
                "predicted tokens/s": f"{low:,.0f} to {high:,.0f}",
                "typical": f"{predicted[name]:,.0f}",
                "measured": f"{measured[name]:,.0f}",
            }
        )
    is_ordered = sorted(predicted, key=lambda name: predicted[name]) == sorted(
        measured, key=lambda name: measured[name]
    )
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    print(f"\norder: {'equal' if is_ordered else 'DIFFERENT'}; measured in the range: {'NO' if outside else 'yes'}")
    return int(outside or not is_ordered)


if __name__ == "__main__":
    sys.exit(main())
