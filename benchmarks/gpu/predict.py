"""Compares what measure.py has measured with what the estimator predicts for the same cases; needs no GPU.

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
from peftbench.errors import BudgetTooSmallError
from peftbench.memory.devices import get_facts_by_torch_name
from peftbench.memory.estimate import estimate
from peftbench.memory.replay import AllocatorReplay, replay_allocator
from peftbench.memory.simulation.device import DeviceType
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.recipe.schema import Recipe
from peftbench.record import RunRecord, read_records

Row = dict[str, str]


@contextmanager
def with_config(recipe: Recipe, size: Size) -> Iterator[Recipe]:
    """The recipe over a folder with the config of its architecture."""
    with TemporaryDirectory() as folder:
        GPT2Config(**size.config).save_pretrained(folder)
        yield recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": folder})})


def labels_by_step(recipe: Recipe, size: Size) -> list[list[int]]:
    """Labelled tokens of each row of each step's micro-batch: as many as its example's summary and end have."""
    tokens = RandomTokens(size, vocabulary=2)
    batches = Batches(tokens, Collator(0), recipe.train.global_batch_size, None, recipe.train.seed)
    made = itertools.islice(batches, recipe.train.steps or 0)
    return [[len(tokens.ids[i]) - tokens.prompts[i] for i in batch.micro_batches[0].example_indices] for batch in made]


def rehearsed(recipe: Recipe, record: RunRecord, labels: list[int]) -> tuple[MemorySimulation, AllocatorReplay]:
    """The training of a case, whose rows all have one width."""
    kind: DeviceType = "cuda" if record.device.type == "cuda" else "cpu"
    with MemorySimulation(recipe, kind, 1) as rehearsal:
        rehearsal.simulate_training(recipe.train.global_batch_size, recipe.data.max_length or 0, labels)
    return rehearsal, replay_allocator(list(rehearsal.memory_tracker.iter_events()), kind)


def compared(recipe: Recipe, size: Size, record: RunRecord) -> Iterator[tuple[str, int, int]]:
    """(what, measured, predicted) of a run that ended well: bytes of tensors, allocated by part, reserved."""
    labels = labels_by_step(recipe, size)
    if record.memory_breakdown is not None:
        rehearsal, _ = rehearsed(recipe, record, labels[record.memory_breakdown.step - 1])
        yield "tensors", record.memory_breakdown.peak_bytes, rehearsal.memory_tracker.find_peak().nbytes
    _, found = rehearsed(recipe, record, max(labels[record.untimed_steps :], key=sum))
    for part, moment in found.peak_by_phase.items():
        measured = record.step_memory.get(part)
        if measured is not None and measured.allocated_bytes is not None:
            yield f"allocated, {part}", measured.allocated_bytes, moment.allocated_bytes
    memory = record.memory.get("train")
    if memory is not None and memory.reserved_bytes is not None:
        yield "reserved", memory.reserved_bytes, found.reserved_bytes


def verdict(recipe: Recipe, record: RunRecord) -> Row:
    """What was said of a run that was held to a card's memory, and how it ended."""
    facts = get_facts_by_torch_name(record.device.name)
    small = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"batch_size": 1})})
    try:
        plan = estimate(small, facts, record.device.name, parse_size(CARD))
        said, needed = str(plan.verdict), f"{plan.process_bytes[0] / 2**20:,.0f}"
    except BudgetTooSmallError:
        said, needed = "does not fit", "more than its weights"
    wrong = (said, record.outcome.kind) in {("fits", "oom"), ("does not fit", "ok")}
    return {
        "run": record.name,
        "predicted": said,
        "needs MiB": needed,
        "ended": record.outcome.kind,
        "": "WRONG" if wrong else "",
    }


def main() -> int:
    """Print both tables; ends with 1 where a verdict was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="Folder with the records of one device.")
    parser.add_argument("--tiny", action="store_true", help="They are of the tiny model.")
    given = parser.parse_args()
    recipes = {recipe.name: (recipe, size) for recipe, size in cases(tiny=given.tiny)}
    known = [(*recipes[record.name], record) for record in read_records(given.records) if record.name in recipes]
    rows: list[Row] = []
    off: dict[str, list[float]] = {}
    verdicts: list[Row] = []
    for asked, size, record in known:
        with with_config(asked, size) as recipe:
            if recipe.budget.memory is not None:
                verdicts.append(verdict(recipe, record))
                continue
            for what, measured, predicted in compared(recipe, size, record) if record.outcome.kind == "ok" else ():
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
