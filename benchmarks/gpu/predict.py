"""Compare the measurements of measure.py with estimates for the same cases; needs no GPU.

Run: python benchmarks/gpu/predict.py benchmarks/gpu/records/NVIDIA-H100-80GB-HBM3
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from cases import CARD, RandomTokens, Size, cases
from tabulate import tabulate
from transformers import GPT2Config

from peftbench.common.units import parse_size
from peftbench.data.batches import Batches
from peftbench.data.collate import Collator
from peftbench.data.encode import count_labels
from peftbench.memory.devices import get_device_facts, get_facts_by_torch_name
from peftbench.memory.estimate import estimate
from peftbench.memory.replay import AllocatorReplay, replay_allocator
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.recipe.schema import Recipe
from peftbench.record import RunRecord, read_records

Row = dict[str, str]


@contextmanager
def with_config(recipe: Recipe, size: Size) -> Iterator[Recipe]:
    """Yield the recipe with a temporary model folder that holds its config."""
    with TemporaryDirectory() as folder:
        GPT2Config(**size.config).save_pretrained(folder)
        yield recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": folder})})


def labels_by_step(recipe: Recipe, size: Size) -> list[list[int]]:
    """Return the number of labels of each row of each step's micro-batch."""
    tokens = RandomTokens(size, vocabulary=2)
    batches = Batches(tokens, Collator(0), recipe.train.global_batch_size, None, recipe.train.seed)
    batches_of_run = itertools.islice(batches, recipe.train.steps or 0)
    return [
        [count_labels(tokens.label_spans[i]) for i in batch.micro_batches[0].example_indices]
        for batch in batches_of_run
    ]


def simulate(recipe: Recipe, record: RunRecord, labels: list[int]) -> tuple[MemorySimulation, AllocatorReplay]:
    """Simulate the training of a case, whose rows all have one width."""
    facts = get_facts_by_torch_name(record.device.name) if record.device.type == "cuda" else get_device_facts("cpu")
    with MemorySimulation(recipe, facts.capability, 1) as simulation:
        simulation.simulate_training(recipe.train.global_batch_size, recipe.data.max_length or 0, labels)
    return simulation, replay_allocator(list(simulation.memory_tracker.iter_events()), facts.device_type)


def compare(recipe: Recipe, size: Size, record: RunRecord) -> Iterator[tuple[str, int, int]]:
    """Yield (name, measured, predicted) of a finished run: bytes of tensors, allocated by part, reserved."""
    labels = labels_by_step(recipe, size)
    if record.memory_breakdown is not None:
        simulation, _ = simulate(recipe, record, labels[record.memory_breakdown.step - 1])
        yield "tensors", record.memory_breakdown.peak_bytes, simulation.memory_tracker.find_peak().nbytes
    _, replay = simulate(recipe, record, max(labels[record.untimed_steps :], key=sum))
    for part, moment in replay.peak_by_phase.items():
        measured = record.step_memory.get(part)
        if measured is not None and measured.allocated_bytes is not None:
            yield f"allocated, {part}", measured.allocated_bytes, moment.allocated_bytes
    memory = record.memory.get("train")
    if memory is not None and memory.reserved_bytes is not None:
        yield "reserved", memory.reserved_bytes, replay.reserved_bytes


def build_verdict_row(recipe: Recipe, record: RunRecord) -> Row:
    """Return the predicted verdict and the outcome of a run with a memory budget."""
    facts = get_facts_by_torch_name(record.device.name)
    small = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"batch_size": 1})})
    plan = estimate(small, facts, record.device.name, parse_size(CARD))
    predicted, needed = str(plan.verdict), f"{plan.process_bytes[0] / 2**20:,.0f}"
    wrong = (predicted, record.outcome.kind) in {("fits", "oom"), ("does not fit", "ok")}
    return {
        "run": record.name,
        "predicted": predicted,
        "needs MiB": needed,
        "ended": record.outcome.kind,
        "": "WRONG" if wrong else "",
    }


def main() -> int:
    """Print both tables; return 1 if a verdict was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="Folder with the records of one device.")
    parser.add_argument("--tiny", action="store_true", help="The records are from --tiny.")
    args = parser.parse_args()
    recipes = {recipe.name: (recipe, size) for recipe, size in cases(tiny=args.tiny)}
    known = [(*recipes[record.name], record) for record in read_records(args.records) if record.name in recipes]
    rows: list[Row] = []
    off: dict[str, list[float]] = {}
    verdicts: list[Row] = []
    for original, size, record in known:
        with with_config(original, size) as recipe:
            if recipe.budget.memory is not None:
                verdicts.append(build_verdict_row(recipe, record))
                continue
            for what, measured, predicted in compare(recipe, size, record) if record.outcome.kind == "ok" else ():
                error = predicted / measured - 1
                off.setdefault(what.split(",")[0], []).append(abs(error))
                rows.append(
                    {
                        "run": record.name,
                        "bytes": what,
                        "measured": f"{measured:,}",
                        "predicted": f"{predicted:,}",
                        "off by": f"{error:+.3%}",
                    }
                )
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    for what, errors in off.items():
        print(f"{what}: off by {statistics.median(errors):.3%} in the median, {max(errors):.3%} at worst")
    if verdicts:
        print(tabulate(verdicts, headers="keys", tablefmt="github", disable_numparse=True))
    return int(any(row[""] for row in verdicts))


if __name__ == "__main__":
    sys.exit(main())
