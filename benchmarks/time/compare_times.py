"""Compare predictions.json with measurements.json: ratios, rank correlation, and pairs that are close.

Run: python benchmarks/time/compare_times.py benchmarks/time/records
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from scipy.stats import spearmanr
from tabulate import tabulate
from timed_strategies import FOUR_METHODS

MAX_ERROR = 0.15
"""Largest allowed error of the four methods."""
MIN_RANK_CORRELATION = 0.9
CLOSE_RATIO = 1.3
MIN_CLOSE_PAIRS = 4


def main() -> int:
    """Print the table and whether each goal is met; return 1 if one is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder with predictions.json and measurements.json.")
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="Compare with the process's CPU time, for a machine that is in use."
    )
    args = parser.parse_args()
    predictions = json.loads((args.folder / "predictions.json").read_text(encoding="utf-8"))
    measurements = json.loads((args.folder / "measurements.json").read_text(encoding="utf-8"))
    key = "cpu_seconds" if args.cpu_seconds else "seconds"
    measured = {name: found[key] for name, found in measurements["strategies"].items()}
    predicted = {
        name: (found["seconds"][0] * found["seconds"][1]) ** 0.5 for name, found in predictions["strategies"].items()
    }
    names = [name for name in measured if name in predicted]
    rows = [
        {
            "strategy": name,
            "predicted (s)": f"{predicted[name]:.4f}",
            "measured (s)": f"{measured[name]:.4f}",
            "predicted / measured": f"{predicted[name] / measured[name]:.3f}",
        }
        for name in names
    ]
    correlation = float(spearmanr([predicted[name] for name in names], [measured[name] for name in names]).statistic)
    pairs = list(itertools.combinations(names, 2))
    close = [pair for pair in pairs if max(_ratio(measured, pair), 1 / _ratio(measured, pair)) <= CLOSE_RATIO]
    same = sum((_ratio(measured, pair) > 1) == (_ratio(predicted, pair) > 1) for pair in close)
    error = max(abs(predicted[name] / measured[name] - 1) for name in FOUR_METHODS)
    goals = {
        f"predicted before measured: {predictions['written_at']}, {measurements['started_at']}": (
            predictions["written_at"] < measurements["started_at"]
        ),
        f"largest error of the four methods {error:.1%}, at most {MAX_ERROR:.0%}": error <= MAX_ERROR,
        f"rank correlation of {len(names)} strategies {correlation:.3f}, at least {MIN_RANK_CORRELATION}": (
            correlation >= MIN_RANK_CORRELATION
        ),
        f"pairs within {CLOSE_RATIO}x: {len(close)}, at least {MIN_CLOSE_PAIRS} ({same} in the predicted order)": (
            len(close) >= MIN_CLOSE_PAIRS
        ),
    }
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    print()
    print("\n".join(f"- {goal}: {'yes' if is_met else 'NO'}" for goal, is_met in goals.items()))
    return int(not all(goals.values()))


def _ratio(seconds: dict[str, float], pair: tuple[str, str]) -> float:
    return seconds[pair[0]] / seconds[pair[1]]


if __name__ == "__main__":
    sys.exit(main())
