"""Train one arm, measure it and write one record. ``__main__.py`` starts this as a process.

Run: python benchmarks/vs_trainer/arm.py prepare CONFIG_FOLDER OUT SEED
     python benchmarks/vs_trainer/arm.py measure JOBS.json
It needs only torch, transformers, accelerate, peft, datasets, pydantic and platformdirs (and trl for its arms).
"""

from __future__ import annotations

import os

# Set before importing any Hugging Face library, since each reads the environment once.
os.environ |= {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}

import contextlib
import datetime
import gc
import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch
from examples import read_examples
from measured import Measured
from spec import NEEDS_TRL, OURS, Job
from trained import COUNTED_STEP, Trained
from transformers import logging as transformers_logging

from peftbench.common.filesystem import write_atomically
from peftbench.distributed.accelerator import describe_device
from peftbench.errors import PeftbenchError
from peftbench.modeling.loading import build_from_config, get_max_positions, load_config, load_tokenizer
from peftbench.optim import OPTIMIZER_LIBRARIES
from peftbench.profiler.memory import MemoryMeter, build_memory_meter
from peftbench.recipe.schema import Model
from peftbench.record.environment import get_library_versions

MIB = 2**20
LEFT = 16 * MIB
"""Memory an arm may leave allocated in its process without a note, bytes."""


def prepare(config: Path, out: Path, seed: int) -> None:
    """Save the base model of all arms: the architecture with seeded random weights, and its tokenizer."""
    model = Model(path=str(config))
    tokenizer = load_tokenizer(model)
    torch.manual_seed(seed)
    build_from_config(model, load_config(model)).save_pretrained(out)
    tokenizer.save_pretrained(out)


def measure(job: Job) -> Measured:
    """Train one arm, in a process that has only imported libraries."""
    torch.set_num_threads(job.spec.threads)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    _import_all(job)
    meter: MemoryMeter = build_memory_meter(torch.device(job.spec.device))
    # The same baseline for every arm. peftbench's Run takes its own later, after tokenizer and examples are loaded.
    baseline = meter.lap().baseline_rss_bytes
    held = torch.cuda.memory_allocated() if job.spec.device == "cuda" else 0
    model = Model(path=job.base)
    max_positions = get_max_positions(load_config(model))
    if max_positions is None:
        raise PeftbenchError("the model's config has no number of positions; use a model that has one")
    examples = read_examples(job, load_tokenizer(model), max_positions)
    if job.arm == OURS:
        import ours

        trained = ours.run(job, examples, max_positions)
    else:
        import peers

        trained = peers.run(job, examples, max_positions, meter)
    memory = trained.memory.model_copy(update={"baseline_rss_bytes": baseline})
    return _record(job, replace(trained, memory=memory), examples.fingerprint, started, held)


def _import_all(job: Job) -> None:
    """Import the arm's libraries, so that none counts as training memory."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    if job.arm == OURS:
        import ours  # noqa: F401
    else:
        import peers  # noqa: F401

        with contextlib.suppress(ImportError):  # accelerate checks for a DeepSpeed model if it is installed
            import deepspeed  # noqa: F401
    if job.arm in NEEDS_TRL:
        import trl.trainer.sft_trainer  # noqa: F401


def _record(job: Job, trained: Trained, data_fingerprint: str, started: str, held: int) -> Measured:
    from accelerate import Accelerator

    device = describe_device(Accelerator())  # shares the arm's state
    notes = [*trained.notes, *([f"{held:,} bytes were still allocated by earlier arms"] if held > LEFT else [])]
    spec = job.spec
    return Measured(
        case=job.case,
        arm=job.arm,
        repeat=job.repeat,
        spec=spec,
        settings=trained.settings,
        notes=tuple(notes),
        started_at=started,
        device_kind=device.type,
        device_name=device.name,
        threads=torch.get_num_threads(),
        versions=get_library_versions(OPTIMIZER_LIBRARIES) | _trl_version(),
        git=_git_state(),
        data_fingerprint=data_fingerprint,
        model_fingerprint=trained.model_fingerprint,
        trainable_parameters=trained.trainable_parameters,
        untimed_steps=spec.untimed_steps(job.case),
        losses=trained.losses,
        step_seconds=trained.step_seconds,
        train_seconds=trained.seconds,
        real_tokens=trained.real_tokens,
        labeled_tokens=trained.labeled_tokens,
        memory=trained.memory,
        counted_step=COUNTED_STEP,
        model_flops=trained.model_flops,
        hardware_flops=trained.hardware_flops,
    )


def _trl_version() -> dict[str, str]:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return {"trl": metadata.version("trl")}
    return {}


def _git_state() -> str | None:
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def summarize(measured: Measured) -> str:
    """Return a record in one line."""
    peak = measured.peak_bytes
    flop_ratio = "unknown"
    if measured.model_flops and measured.hardware_flops:
        flop_ratio = f"{measured.model_flops / measured.hardware_flops:.1%}"
    return (
        f"{measured.case}, {measured.arm}, repeat {measured.repeat}: {measured.tokens_per_second:,.0f} real tokens/s, "
        f"peak {'unknown' if peak is None else f'{peak / MIB:,.0f} MiB'}, model FLOPs / hardware FLOPs {flop_ratio}, "
        f"last loss {measured.losses[-1]:.5f}"
    )


def measure_all(jobs: Sequence[Job], seconds: float | None) -> None:
    """Measure each job and write its record; start none after ``seconds``."""
    started = time.monotonic()
    for index, job in enumerate(jobs):
        if seconds is not None and time.monotonic() - started > seconds:
            print(
                f"time is up; {len(jobs) - index} measurements are left; run the same command again to resume",
                flush=True,
            )
            return
        with contextlib.redirect_stdout(sys.stderr):
            measured = measure(job)
        write_atomically(Path(job.out), measured.model_dump_json(indent=1) + "\n")
        print(summarize(measured), flush=True)
        reset_process()


def reset_process() -> None:
    """Free the memory and state of an arm before the next one in this process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(AttributeError):  # a private function of torch
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def _quiet() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It sets its own level on import.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore")


def main() -> int:
    """Prepare the base, or measure."""
    _quiet()
    try:
        if sys.argv[1] == "prepare":
            prepare(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
            return 0
        request = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
        measure_all([Job.model_validate(entry) for entry in request["jobs"]], request["seconds"])
    except PeftbenchError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
