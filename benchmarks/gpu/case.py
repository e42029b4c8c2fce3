"""One case of measure.py, in a process that runs nothing else: CUDA starts here and ends here.

Run: python benchmarks/gpu/case.py [--tiny] (--names | --out FOLDER NAME)
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import sys
import warnings
from pathlib import Path

import torch
from cases import RandomTokens, Size, cases
from transformers import AutoModelForCausalLM, GPT2Config
from transformers import logging as transformers_logging

from peftbench.errors import PeftbenchError, RecordError
from peftbench.modeling.loading import LoadedModel, fuse_gelu, load_tokenizer
from peftbench.recipe.schema import Model, Recipe
from peftbench.record import FINAL_OUTCOMES, RECORD_FILE, RunRecord, read_record, train_peak_bytes
from peftbench.run.runner import Run
from peftbench.run.stages import adapt_model, measure_training

NO_DEVICE = 2


class ArchitectureRun(Run):
    """A run of an architecture over random tokens: trained and measured like any other, and not evaluated."""

    def __init__(self, recipe: Recipe, size: Size) -> None:
        super().__init__(recipe)
        self.size = size

    def run_stages(self) -> None:
        """Build, train and gather the measurements."""
        state = self.state
        state.data_fingerprint = self.size.source.fingerprint()
        self.oom_handler.enforce_budget(state.probe.memory_meter)
        with state.probe.phase("load"):
            base_model = self._build_base_model()
        with state.probe.phase("build"):
            adapted_model = adapt_model(state, base_model)
        examples = RandomTokens(self.size, base_model.model.config.vocab_size)
        state.set_example_counts("train", len(examples), 0)
        self.train(adapted_model, examples, pad_token_id=0)
        measure_training(state)

    def _build_base_model(self) -> LoadedModel:
        torch.manual_seed(self.state.recipe.train.seed)
        with self.accelerator.device:
            model = AutoModelForCausalLM.from_config(
                GPT2Config(**self.size.config), dtype=torch.float32, attn_implementation="sdpa"
            )
        if self.state.recipe.model.fused_gelu:
            fuse_gelu(model)
        return LoadedModel(model, load_tokenizer(Model()), "random weights")


def device_name() -> str:
    """Return torch's device name as a folder name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def measure(out: Path, name: str, *, tiny: bool) -> None:
    """Run one case and print its result in one line."""
    recipe, size = next(case for case in cases(tiny=tiny, folder=str(out / device_name())) if case[0].name == name)
    if _has_record(out / device_name() / recipe.name / RECORD_FILE):
        print(f"{recipe.name}: has a record", flush=True)
        return
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            record, _ = ArchitectureRun(recipe, size).execute()
            summary = summarize(record)
        except PeftbenchError as error:
            summary = f"refused: {error}"
    print(f"{recipe.name}: {summary}", flush=True)


def _has_record(path: Path) -> bool:
    try:
        return path.exists() and read_record(path).outcome.kind in FINAL_OUTCOMES
    except RecordError:  # another version: measure again
        return False


def summarize(record: RunRecord) -> str:
    """Return a record in one line."""
    if record.throughput is None:
        return f"{record.outcome.kind} in {record.outcome.phase}, {record.outcome.step_part}: {record.outcome.error}"
    peak, speed = train_peak_bytes(record), record.throughput
    step = record.flops.counted_step
    counted = step is not None and step.counted_flops == step.closed_form_flops
    mfu = "unknown" if record.compute.mfu is None else f"{record.compute.mfu:.1%}"
    return (
        f"{speed.step_seconds_median * 1e3:,.1f} ms a step, {speed.tokens_per_second.real:,.0f} real tokens/s, "
        f"peak {peak or 0:,} bytes, MFU {mfu}, "
        f"FLOPs {'as counted' if counted else 'NOT as counted'}"
    )


def main() -> int:
    """Print the names of the cases, or measure one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="Use the tiny model.")
    parser.add_argument("--names", action="store_true", help="Print the names of all cases.")
    parser.add_argument("--out", type=Path, help="Folder for records.")
    parser.add_argument("name", nargs="?", help="The case to measure.")
    args = parser.parse_args()
    if args.names:
        print("\n".join(recipe.name for recipe, _ in cases(tiny=args.tiny)))
        return 0
    if not args.tiny and not torch.cuda.is_available():
        print("no CUDA device found; use --tiny to try it on CPU", file=sys.stderr)
        return NO_DEVICE
    measure(args.out, args.name, tiny=args.tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
