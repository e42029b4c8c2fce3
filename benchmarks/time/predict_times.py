"""Predict the step time of every strategy from a calibration file; run it before measure_times.py.

Run: python benchmarks/time/predict_times.py DEVICE.json PREDICTIONS.json
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

from timed_strategies import COMPLETION_WORDS, SETTINGS, TOKENS, build_recipe

from peftbench.common.filesystem import write_atomically
from peftbench.data.batches import compute_micro_batching
from peftbench.memory.devices import DeviceFacts, read_device_file
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.memory.step_time import predict_time
from peftbench.timing.prediction import StepTime

LABELS = COMPLETION_WORDS + 1
"""Labeled tokens of a row: its completion and the end token."""


def predict(name: str, facts: DeviceFacts) -> StepTime:
    """Return the predicted time of a strategy; its precision may be one without a memory estimate."""
    recipe = build_recipe(name)
    tokens = SETTINGS[name].get("tokens", TOKENS)
    limit = recipe.train.resolved_micro_batch_size
    accumulation, rows = compute_micro_batching(recipe.train.global_batch_size, limit, 1)
    with MemorySimulation(recipe, facts.capability, accumulation) as simulation:
        simulation.simulate_training(rows, tokens, LABELS)
    step_time, notes = predict_time(simulation.operation_log.count_step(simulation.accumulation), recipe, facts, tokens)
    if step_time is None:
        raise SystemExit(f"{name}: {', '.join(notes) or 'the device file has no measured speed'}")
    return step_time


def main() -> None:
    """Write the predictions with the time of writing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", type=Path, help="A file of peftbench calibrate.")
    parser.add_argument("out", type=Path, help="File to write.")
    args = parser.parse_args()
    facts = read_device_file(args.device)
    predictions = {name: predict(name, facts).model_dump() for name in SETTINGS}
    written_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_atomically(args.out, json.dumps({"written_at": written_at, "strategies": predictions}, indent=1) + "\n")


if __name__ == "__main__":
    main()
