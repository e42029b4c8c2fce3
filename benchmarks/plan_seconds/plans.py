"""Measure the seconds of memory plans, with a few simulated layers and with all of them, side by side.

Run: python benchmarks/plan_seconds/plans.py [--repeats 5] [CASE ...]

Each plan runs in a process of its own. Both kinds alternate. The seconds of an import of torch and of the model's class
in a process of its own are measured too, since no plan can take less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tabulate import tabulate

LORA = ("method.kind=lora", "train.gradient_checkpointing=true")
QLORA = (*LORA, "model.quantization=nf4")
CASES: dict[str, tuple[str, ...]] = {
    "GPT-2, full": ("model.path=openai-community/gpt2", "method.kind=full"),
    "GPT-2, LoRA": ("model.path=openai-community/gpt2", *LORA),
    "Llama-3.1-8B, full, 8-bit AdamW": (
        "model.path=meta-llama/Llama-3.1-8B",
        "method.kind=full",
        "optimizer.kind=adamw8bit",
        "train.gradient_checkpointing=true",
    ),
    "Llama-3.1-8B, LoRA": ("model.path=meta-llama/Llama-3.1-8B", *LORA),
    "Llama-3.1-8B, QLoRA": ("model.path=meta-llama/Llama-3.1-8B", *QLORA),
    "Llama-3.1-70B, QLoRA": ("model.path=meta-llama/Llama-3.1-70B", *QLORA),
    "gemma-2-9b, LoRA": ("model.path=google/gemma-2-9b", "model.attention=auto", *LORA),
}
RECIPE = Path(__file__).parents[2] / "recipes" / "demo" / "full.yaml"
_SETTINGS = ("data.max_length=2048", "train.global_batch_size=1", "train.micro_batch_size=1", "evaluate.batch_size=1")


def plan(overrides: list[str], *, simulates_all_layers: bool) -> dict[str, int | None]:
    """Return the main values of the plan on an RTX 4090."""
    from peftbench.common.libraries import quiet_libraries

    quiet_libraries()
    from peftbench.memory.devices import get_device_facts
    from peftbench.memory.search import MemoryTarget
    from peftbench.memory.simulation import simulated_run
    from peftbench.recipe.arguments import load_recipe_from_arguments

    if simulates_all_layers:
        simulated_run.find_layer_pattern = lambda *_: None  # type: ignore[assignment]
    recipe = load_recipe_from_arguments("estimate", [str(RECIPE), *_SETTINGS, *overrides], [])
    found = MemoryTarget(get_device_facts("rtx-4090"), "rtx-4090", None).plan(recipe)
    return {"live": found.peak.live_bytes, "reserved": found.reserved_bytes, "flops": found.step_flops}


def import_model_class(overrides: list[str]) -> dict[str, int | None]:
    """Import torch and the class of the recipe's model."""
    import torch
    from transformers import AutoModelForCausalLM

    from peftbench.memory.families import with_bundled_config
    from peftbench.modeling.loading import load_config
    from peftbench.recipe.arguments import load_recipe_from_arguments

    recipe = load_recipe_from_arguments("estimate", [str(RECIPE), *overrides], [])
    with with_bundled_config(recipe.model) as model, torch.device("meta"):
        config = load_config(model)
        AutoModelForCausalLM._model_mapping[type(config)]
    return {}


def run_case(case: str, kind: str) -> tuple[float, float, dict[str, int | None]]:
    """Return wall seconds, CPU seconds and the values of a process."""
    command = [sys.executable, __file__, "--process", kind, case]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, json.loads(done.stdout.splitlines()[-1])


def measure(case: str, repeats: int) -> list[object]:
    """Return the table's row of a case.

    Raises:
        SystemExit: both kinds of plan give different values.
    """
    runs = [{kind: run_case(case, kind) for kind in ("import", "few", "all")} for _ in range(repeats)]
    results = {json.dumps(run[kind][2]) for run in runs for kind in ("few", "all")}
    if len(results) != 1:
        raise SystemExit(f"{case}: the plans differ: {results}")
    wall = {kind: statistics.median(run[kind][0] for run in runs) for kind in ("import", "few", "all")}
    cpu = {kind: statistics.median(run[kind][1] for run in runs) for kind in ("few", "all")}
    ratio = statistics.median(run["all"][1] / run["few"][1] for run in runs)
    return [case, *(f"{seconds:.1f}" for seconds in (*wall.values(), *cpu.values())), f"{ratio:.1f}"]


def main() -> None:
    """Print a table, or the values of one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], default=[])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--process", choices=["few", "all", "import"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process is not None:
        overrides = list(CASES[args.cases[0]])
        is_import = args.process == "import"
        print(
            json.dumps(
                import_model_class(overrides)
                if is_import
                else plan(overrides, simulates_all_layers=args.process == "all")
            )
        )
        return
    headers = [
        "plan",
        "import (s)",
        "few layers (s)",
        "all layers (s)",
        "few, CPU (s)",
        "all, CPU (s)",
        "CPU, all / few",
    ]
    rows = [measure(case, args.repeats) for case in args.cases or CASES]
    print(tabulate(rows, headers=headers, disable_numparse=True))
    print(f"wall seconds, median of {args.repeats}; {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
