"""Compare speed, memory and FLOPs of peftbench, HF Trainer and TRL's SFTTrainer on the same training.

Each measurement runs in its own process (arm.py). Arms alternate, and a ratio compares two measurements of one repeat.
A measurement with a record of the same settings is skipped.

Run: python benchmarks/vs_trainer --data FOLDER --model FOLDER
     python benchmarks/vs_trainer --report FOLDER [--update-file README.md]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

# Import nothing that could start CUDA: this process would share the GPU with the measured one.
from measured import Measured, read_measured
from pydantic import ValidationError
from spec import ARMS, CASES, DEFAULTS, NEEDS_TRL, OURS, REPEATS, Job, Kind, Spec

from peftbench.errors import MissingFileError, OutOfRangeError, PeftbenchError, RecordError

HERE = Path(__file__).resolve().parent
MARKER = "vs_trainer"
INTERRUPTED = 130


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data, model = os.environ.get("VS_TRAINER_DATA"), os.environ.get("VS_TRAINER_MODEL")
    parser.add_argument("--data", type=Path, default=data, help="Folder with train.jsonl; or $VS_TRAINER_DATA.")
    parser.add_argument("--model", type=Path, default=model, help="GPT-2's config, tokenizer; or $VS_TRAINER_MODEL.")
    parser.add_argument("--methods", nargs="+", default=list(CASES), metavar="CASE", help=f"Of {', '.join(CASES)}.")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="ARM", help=f"Of {', '.join(ARMS)}.")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="Measurements of each arm.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="Device to run on.")
    for name, field in Spec.model_fields.items():
        if name != "device":
            kind: Callable[[str], object] = {int: int, float: float}.get(field.annotation, str)  # type: ignore[arg-type]
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=field.description)
    parser.add_argument("--out", type=Path, help="Folder for records; default: records/DEVICE next to this file.")
    parser.add_argument("--minutes", type=float, help="Start no measurement after this many minutes.")
    parser.add_argument(
        "--together",
        action="store_true",
        help="On a GPU, all measurements in one process, to save starts: torch's peaks are reset between them.",
    )
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="Measure nothing; print the table of records.")
    parser.add_argument("--update-file", type=Path, help="Markdown file whose block --marker is replaced by the table.")
    parser.add_argument("--marker", default=MARKER, help="The block between <!-- report:NAME --> and its end.")
    return parser.parse_args(argv)


def resolve_device(requested: str) -> Kind:
    """Return the device. A separate process checks, since checking initializes CUDA in a process."""
    if requested == "cpu":
        return "cpu"
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    has_cuda = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0  # noqa: S603
    if requested == "cuda" and not has_cuda:
        raise OutOfRangeError("--device cuda: no CUDA device found; use --device cpu")
    return "cuda" if has_cuda else "cpu"


def build_spec(args: argparse.Namespace, device: Kind) -> Spec:
    """Return the device's defaults with the given options.

    Raises:
        OutOfRangeError: an option is invalid.
    """
    options = {name: getattr(args, name) for name in Spec.model_fields if getattr(args, name, None) is not None}
    defaults = {"threads": os.cpu_count() or 1} | DEFAULTS[device]
    if "batch" in options and "micro_batch" not in options and device == "cuda":
        options["micro_batch"] = options["batch"]
    try:
        return Spec.model_validate(defaults | options | {"device": device})
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"--{place}: ".replace("_", "-") for place in first["loc"])
        raise OutOfRangeError(f"{where}{first['msg']}") from error


def check(args: argparse.Namespace) -> None:
    """Refuse invalid options before anything runs.

    Raises:
        PeftbenchError: an option is invalid, or a file is missing.
    """
    wanted = {"--data": "train.jsonl", "--model": "config.json"}
    for option, folder in (("--data", args.data), ("--model", args.model)):
        if folder is None:
            raise MissingFileError(f"{option} must name a folder with {wanted[option]}")
        if not (Path(folder) / wanted[option]).is_file():
            raise MissingFileError(f"{option} {folder} has no {wanted[option]}")
    for option, names, known in (("--methods", args.methods, CASES), ("--arms", args.arms, ARMS)):
        if unknown := [name for name in names if name not in known]:
            raise OutOfRangeError(f"{option} {unknown[0]} is not one of {', '.join(known)}")
    if args.repeats < 1:
        raise OutOfRangeError("--repeats must be 1 or more")
    if OURS not in args.arms:
        raise OutOfRangeError(f"--arms must include {OURS}, the reference of all ratios")


def list_installed_arms(requested: Sequence[str]) -> list[str]:
    """Return the arms whose libraries are installed, and print the others."""
    if importlib.util.find_spec("trl") is not None:
        return list(requested)
    if left_out := [arm for arm in requested if arm in NEEDS_TRL]:
        print(f"left out, since trl is not installed: {', '.join(left_out)}", file=sys.stderr, flush=True)
    return [arm for arm in requested if arm not in NEEDS_TRL]


def list_jobs(args: argparse.Namespace, spec: Spec, base: str, out: Path) -> list[Job]:
    """Return all measurements in order: the arms of each case in turn, reversed in every other repeat."""
    arms, train = list_installed_arms(args.arms), str(Path(args.data) / "train.jsonl")
    return [
        Job(
            spec=spec,
            case=case,
            arm=arm,
            repeat=repeat,
            train=train,
            base=base,
            out=str(out / case / f"{arm}-{repeat}.json"),
        )
        for repeat in range(1, args.repeats + 1)
        for case in args.methods
        for arm in (arms if repeat % 2 else arms[::-1])
    ]


def has_record(job: Job) -> bool:
    """True if it was measured before with the same settings."""
    try:
        return Measured.model_validate_json(Path(job.out).read_bytes()).spec == job.spec
    except (OSError, ValidationError):
        return False


def run_arm(arguments: Sequence[str], spec: Spec, scratch: str) -> int:
    """Run arm.py with an empty feature cache and return its exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": str(spec.threads), "MKL_NUM_THREADS": str(spec.threads)}
    environment["PEFTBENCH_CACHE"] = str(Path(scratch) / "cache")
    if spec.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, str(HERE / "arm.py"), *arguments], check=False, env=environment)  # noqa: S603
    return done.returncode


def measure(args: argparse.Namespace) -> Path:
    """Run all measurements without a record and return the folder of records.

    Raises:
        PeftbenchError: the options are invalid, or a measurement failed.
    """
    check(args)
    spec = build_spec(args, resolve_device(args.device))
    if args.together and spec.device != "cuda":
        raise OutOfRangeError("--together needs a GPU: on a CPU one arm's memory would count in the next one's peak")
    out: Path = args.out or HERE / "records" / f"{spec.device}_{spec.precision}"
    started = time.monotonic()
    with TemporaryDirectory() as scratch:
        base, file = Path(scratch) / "base", Path(scratch) / "jobs.json"
        left = [job for job in list_jobs(args, spec, str(base), out) if not has_record(job)]
        if left and (code := run_arm(["prepare", str(args.model), str(base), str(spec.seed)], spec, scratch)):
            raise PeftbenchError(f"cannot build the base model (exit code {code})")
        failed = []
        for index, part in enumerate([left] if args.together and left else [[job] for job in left]):
            seconds = None if args.minutes is None else args.minutes * 60 - (time.monotonic() - started)
            if seconds is not None and seconds < 0:
                print(
                    f"time is up; {len(left) - index} measurements are left; run the same command again to resume",
                    flush=True,
                )
                break
            options = {"jobs": [job.model_dump(mode="json") for job in part], "seconds": seconds}
            shutil.rmtree(Path(scratch) / "cache", ignore_errors=True)  # from the previous repeat
            file.write_text(json.dumps(options), encoding="utf-8")
            if run_arm(["measure", str(file)], spec, scratch):
                failed.append("one" if args.together else f"{part[0].case}, {part[0].arm}, repeat {part[0].repeat}")
    if failed:
        raise PeftbenchError(f"failed: {'; '.join(failed)}; run the same command again to resume")
    return out


def report(folder: Path, update_file: Path | None, marker: str) -> int:
    """Print the table, or write it to a file; return 1 if records are not comparable."""
    records = read_measured(folder)
    if importlib.util.find_spec("tabulate") is None:
        print(f"no table: tabulate is not installed; install it and use --report {folder}", file=sys.stderr)
        return 0
    from comparison import problems, table

    if update_file is None:
        print(table(records))
    elif found := problems(records):
        raise RecordError(f"{update_file} was not changed: {found[0]}")
    else:
        from peftbench.report.tables.table import insert_block

        insert_block(table(records), update_file, marker)
    return int(bool(problems(records)))


def main() -> int:
    """Measure and report, or only report."""
    args = parse_args()
    try:
        return report(args.report or measure(args), args.update_file, args.marker)
    except PeftbenchError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: records so far are kept; run the same command again to resume", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
