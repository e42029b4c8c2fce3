"""Memory, speed and FLOPs of every method on the GPU at hand: no data set, no hub, no network.

GPT-2 small and medium as architectures alone, random tokens in lengths drawn from CNN/DailyMail's, padded to one width;
four methods, fp32 and bf16, with and without gradient checkpointing. Each case is a process of its own (case.py) that
runs peftbench's own loop under its own instruments and writes a record, an out-of-memory included. A case with a record
is not run again, so that a call that ran out of time goes on where it stopped.

Run: python benchmarks/gpu/measure.py
It needs torch, transformers, accelerate and peft, and of peftbench's other requirements pydantic, platformdirs,
filelock and nvidia-ml-py alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

# Nothing that could start CUDA is imported here: a second process would be on the GPU with the one that is measured.
HERE = Path(__file__).resolve().parent
NO_DEVICE = 2
GRACE_SECONDS = 60.0
"""What a case that has begun is given beyond the minutes."""


def main() -> int:
    """Measure every case that has no record yet, as long as there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "records", help="Folder for records, one folder a device.")
    parser.add_argument("--tiny", action="store_true", help="A model of 0.1 M parameters, for a try without a GPU.")
    parser.add_argument("--minutes", type=float, default=8.5, help="Begin no case after this many.")
    given = parser.parse_args()
    case = [sys.executable, str(HERE / "case.py"), *(["--tiny"] if given.tiny else [])]
    started = time.monotonic()
    named = subprocess.run([*case, "--names"], check=False, stdout=subprocess.PIPE, text=True)  # noqa: S603
    if named.returncode:  # it has said why
        return named.returncode
    names, failed = named.stdout.split(), False
    for index, name in enumerate(names):
        left = given.minutes * 60 - (time.monotonic() - started)
        if left < 0:
            print(f"no time for the other {len(names) - index} cases; the same call goes on with them", flush=True)
            break
        try:
            done = subprocess.run(  # noqa: S603
                [*case, "--out", str(given.out), name], check=False, timeout=left + GRACE_SECONDS
            )
        except subprocess.TimeoutExpired:
            print(f"{name}: no time to end; the same call begins it again", flush=True)
            break
        if done.returncode == NO_DEVICE:
            return NO_DEVICE
        failed = failed or done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
