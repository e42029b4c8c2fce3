"""Run a suite in one process, which starts torch once: many short runs on a CPU take mostly that long otherwise.

Run: python benchmarks/frozen_dtype/one_process.py benchmarks/frozen_dtype/smollm2.yaml --model FOLDER
Runs that have a record are skipped.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from peftbench.suite.expand import expand


def main() -> None:
    """Run every recipe of the suite that has no record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path, help="tiny_gpt2.yaml or smollm2.yaml.")
    parser.add_argument("--model", help="Folder of the base model; the shipped one without it.")
    args = parser.parse_args()
    recipes = expand(args.suite, [] if args.model is None else [f"model.path={args.model}"])
    os.environ["ACCELERATE_USE_CPU"] = "true"

    from accelerate.state import AcceleratorState, GradientState

    from peftbench.run.runner import Run

    for index, recipe in enumerate(recipes, start=1):
        if (Path(recipe.output_dir) / recipe.name / "record.json").exists():
            continue
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        record, _ = Run(recipe).execute()
        loss = "" if record.quality is None else f", held-out loss {record.quality.loss:.4f}"
        print(f"[{index}/{len(recipes)}] {recipe.name}: {record.outcome.kind}{loss}", flush=True)


if __name__ == "__main__":
    main()
