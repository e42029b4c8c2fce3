"""Measure memory, speed and FLOPs of every method on your GPU, without data set, Hub or network.

GPT-2 small and medium with random weights, random tokens with the lengths of CNN/DailyMail, padded to one width;
four methods, fp32 and bf16, with and without gradient checkpointing. Each case runs in its own process (case.py) with
peftbench's training loop and profiler and writes a record, also when out of memory. A case with a record is skipped, so
run the command again to resume.

Run: python benchmarks/gpu/measure.py
It needs only torch, transformers, accelerate, peft, pydantic, platformdirs, filelock and nvidia-ml-py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

# Import nothing that could start CUDA: this process would share the GPU with the measured one.
HERE = Path(__file__).resolve().parent
NO_DEVICE = 2
GRACE_SECONDS = 60.0
"""Extra time for a started case."""


def main() -> int:
    """Measure every case without a record, within the time limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=HERE / "records", help="Folder for records; one subfolder per device."
    )
    parser.add_argument("--tiny", action="store_true", help="A model of 0.1 M parameters, to try it without a GPU.")
    parser.add_argument("--minutes", type=float, default=8.5, help="Start no case after this many minutes.")
    args = parser.parse_args()
    case = [sys.executable, str(HERE / "case.py"), *(["--tiny"] if args.tiny else [])]
    started = time.monotonic()
    listing = subprocess.run([*case, "--names"], check=False, stdout=subprocess.PIPE, text=True)  # noqa: S603
    if listing.returncode:  # it printed the reason
        return listing.returncode
    names, failed = listing.stdout.split(), False
    for index, name in enumerate(names):
        left = args.minutes * 60 - (time.monotonic() - started)
        if left < 0:
            print(f"time is up; {len(names) - index} cases are left; run the same command again to resume", flush=True)
            break
        try:
            done = subprocess.run(  # noqa: S603
                [*case, "--out", str(args.out), name], check=False, timeout=left + GRACE_SECONDS
            )
        except subprocess.TimeoutExpired:
            print(f"{name}: timed out; run the same command again to repeat it", flush=True)
            break
        if done.returncode == NO_DEVICE:
            return NO_DEVICE
        failed = failed or done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
