"""Print how a base in bf16 changes held-out losses, next to the spread over seeds.

Run: python benchmarks/frozen_dtype/losses.py benchmarks/frozen_dtype/records
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

from tabulate import tabulate

from peftbench.record import RunRecord, read_records

MODELS = {"shipped": "tiny GPT-2 (4.3 M)"}
"""Names of base models that are not their folder's."""


def pair_losses(records: list[RunRecord]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Return (loss over a float32 base, loss over a bf16 base) of each seed, by model and method."""
    losses: dict[tuple[str, str, int], dict[str, float]] = defaultdict(dict)
    for record in records:
        assert record.quality is not None
        assert record.quality.loss is not None
        recipe = record.recipe
        key = (Path(recipe["model"]["path"]).name, recipe["method"]["kind"], recipe["train"]["seed"])
        losses[key][recipe["model"]["dtype"]] = record.quality.loss
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for (model, method, _), by_dtype in sorted(losses.items()):
        if by_dtype.keys() >= {"fp32", "bf16"}:
            pairs[model, method].append((by_dtype["fp32"], by_dtype["bf16"]))
    return pairs


def build_row(model: str, method: str, pairs: list[tuple[float, float]]) -> dict[str, str]:
    """Return one row: mean and standard deviation of the differences, and the deviation between seeds."""
    differences = [narrow - wide for wide, narrow in pairs]
    wide_losses = [wide for wide, _ in pairs]
    return {
        "base model": MODELS.get(model, model),
        "method": method,
        "seeds": str(len(pairs)),
        "loss, fp32 base": f"{statistics.mean(wide_losses):.4f}",
        "bf16 - fp32, mean": f"{statistics.mean(differences):+.4f}",
        "its deviation": f"{statistics.stdev(differences):.4f}",
        "largest": f"{max(map(abs, differences)):.4f}",
        "deviation between seeds": f"{statistics.stdev(wide_losses):.4f}",
    }


def main() -> None:
    """Read the records and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="Folder of the suites' records.")
    args = parser.parse_args()
    pairs = pair_losses(read_records(args.records))
    rows = [build_row(model, method, found) for (model, method), found in pairs.items() if len(found) > 1]
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
