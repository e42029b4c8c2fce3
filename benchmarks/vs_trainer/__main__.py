"""peftbench, HF Trainer and TRL's SFTTrainer side by side: speed, memory and FLOPs of the same trainings.

Each measurement is a process of its own (arm.py) that runs nothing else; arms alternate, and a ratio is of two
measurements of one repeat. A measurement with a record of the same settings is not run again.

Run: python benchmarks/vs_trainer --data FOLDER --model FOLDER
     python benchmarks/vs_trainer --report FOLDER [--into README.md]
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

# Nothing that could start CUDA is imported here: a second process would be on the GPU with the one that is measured.
from measured import Measured, read_measured
from pydantic import ValidationError
from spec import ARMS, CASES, DEFAULTS, NEEDS_TRL, OURS, REPEATS, Job, Kind, Spec

from peftbench.errors import MissingFileError, OutOfRangeError, PeftbenchError, RecordError

HERE = Path(__file__).resolve().parent
BLOCK = "vs_trainer"
INTERRUPTED = 130


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data, model = os.environ.get("VS_TRAINER_DATA"), os.environ.get("VS_TRAINER_MODEL")
    parser.add_argument("--data", type=Path, default=data, help="Folder with train.jsonl; or $VS_TRAINER_DATA.")
    parser.add_argument("--model", type=Path, default=model, help="GPT-2's config, tokenizer; or $VS_TRAINER_MODEL.")
    parser.add_argument("--methods", nargs="+", default=list(CASES), metavar="CASE", help=f"Of {', '.join(CASES)}.")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="ARM", help=f"Of {', '.join(ARMS)}.")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="Measurements of each arm.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="Where it runs.")
    for name, field in Spec.model_fields.items():
        if name != "device":
            kind: Callable[[str], object] = {int: int, float: float}.get(field.annotation, str)  # type: ignore[arg-type]
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=field.description)
    parser.add_argument("--out", type=Path, help="Folder for records; default: records/DEVICE beside this file.")
    parser.add_argument("--minutes", type=float, help="Begin no measurement after this many.")
    parser.add_argument(
        "--together",
        action="store_true",
        help="On a GPU, all measurements in one process, to save starts: torch's peaks are reset between them.",
    )
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="Measure nothing; print the table of records.")
    parser.add_argument("--into", type=Path, help="Markdown file whose block --block is replaced by the table.")
    parser.add_argument("--block", default=BLOCK, help="The block: between <!-- report:NAME --> and its end.")
    return parser.parse_args(words)


def device_of(asked: str) -> Kind:
    """Where it runs. A process of its own looks, since one that has looked holds a part of the GPU."""
    if asked == "cpu":
        return "cpu"
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    there = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0  # noqa: S603
    if asked == "cuda" and not there:
        raise OutOfRangeError("there is no CUDA device for --device cuda; give --device cpu")
    return "cuda" if there else "cpu"


def spec_of(given: argparse.Namespace, device: Kind) -> Spec:
    """The device's defaults, changed by what was given.

    Raises:
        OutOfRangeError: it cannot be meant.
    """
    asked = {name: getattr(given, name) for name in Spec.model_fields if getattr(given, name, None) is not None}
    defaults = {"threads": os.cpu_count() or 1} | DEFAULTS[device]
    if "batch" in asked and "micro_batch" not in asked and device == "cuda":
        asked["micro_batch_size"] = asked["batch"]
    try:
        return Spec.model_validate(defaults | asked | {"device": device})
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"--{place}: ".replace("_", "-") for place in first["loc"])
        raise OutOfRangeError(f"{where}{first['msg']}") from error


def check(given: argparse.Namespace) -> None:
    """Refuse what cannot be run, before anything is.

    Raises:
        PeftbenchError: as its sentence says.
    """
    wanted = {"--data": "train.jsonl", "--model": "config.json"}
    for option, folder in (("--data", given.data), ("--model", given.model)):
        if folder is None:
            raise MissingFileError(f"{option} must name a folder with {wanted[option]}")
        if not (Path(folder) / wanted[option]).is_file():
            raise MissingFileError(f"there is no {wanted[option]} in {option} {folder}")
    for option, names, known in (("--methods", given.methods, CASES), ("--arms", given.arms, ARMS)):
        if unknown := [name for name in names if name not in known]:
            raise OutOfRangeError(f"{option} {unknown[0]} is not one of {', '.join(known)}")
    if given.repeats < 1:
        raise OutOfRangeError("--repeats must be 1 or more")
    if OURS not in given.arms:
        raise OutOfRangeError(f"--arms must have {OURS}, which all others are held against")


def arms_here(asked: Sequence[str]) -> list[str]:
    """The arms whose libraries are installed; the others are named and left out."""
    if importlib.util.find_spec("trl") is not None:
        return list(asked)
    if left_out := [arm for arm in asked if arm in NEEDS_TRL]:
        print(f"left out, since trl is not installed: {', '.join(left_out)}", file=sys.stderr, flush=True)
    return [arm for arm in asked if arm not in NEEDS_TRL]


def jobs(given: argparse.Namespace, spec: Spec, base: str, out: Path) -> list[Job]:
    """All measurements in their order: the arms of one case one after another, every other repeat from the last on."""
    arms, train = arms_here(given.arms), str(Path(given.data) / "train.jsonl")
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
        for repeat in range(1, given.repeats + 1)
        for case in given.methods
        for arm in (arms if repeat % 2 else arms[::-1])
    ]


def has_record(job: Job) -> bool:
    """Whether it was measured before, with these very settings."""
    try:
        return Measured.model_validate_json(Path(job.out).read_bytes()).spec == job.spec
    except (OSError, ValidationError):
        return False


def called(words: Sequence[str], spec: Spec, scratch: str) -> int:
    """Run arm.py, with an empty cache for what a trunk gives, and return its exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": str(spec.threads), "MKL_NUM_THREADS": str(spec.threads)}
    environment["PEFTBENCH_CACHE"] = str(Path(scratch) / "cache")
    if spec.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, str(HERE / "arm.py"), *words], check=False, env=environment)  # noqa: S603
    return done.returncode


def measure(given: argparse.Namespace) -> Path:
    """Run all measurements that have no record yet; returns the folder of their records.

    Raises:
        PeftbenchError: what was asked for cannot be run, or a measurement failed.
    """
    check(given)
    spec = spec_of(given, device_of(given.device))
    if given.together and spec.device != "cuda":
        raise OutOfRangeError("--together is for a GPU: on a CPU one arm's memory would be in the next one's peak")
    out: Path = given.out or HERE / "records" / f"{spec.device}_{spec.precision}"
    started = time.monotonic()
    with TemporaryDirectory() as scratch:
        base, file = Path(scratch) / "base", Path(scratch) / "jobs.json"
        left = [job for job in jobs(given, spec, str(base), out) if not has_record(job)]
        if left and (code := called(["prepare", str(given.model), str(base), str(spec.seed)], spec, scratch)):
            raise PeftbenchError(f"the base could not be made (exit code {code})")
        failed = []
        for index, part in enumerate([left] if given.together and left else [[job] for job in left]):
            seconds = None if given.minutes is None else given.minutes * 60 - (time.monotonic() - started)
            if seconds is not None and seconds < 0:
                print(f"no time for the other {len(left) - index}; the same call goes on with them", flush=True)
                break
            asked = {"jobs": [job.model_dump(mode="json") for job in part], "seconds": seconds}
            shutil.rmtree(Path(scratch) / "cache", ignore_errors=True)  # of the repeat before
            file.write_text(json.dumps(asked), encoding="utf-8")
            if called(["measure", str(file)], spec, scratch):
                failed.append("one" if given.together else f"{part[0].case}, {part[0].arm}, repeat {part[0].repeat}")
    if failed:
        raise PeftbenchError(f"not measured to the end: {'; '.join(failed)}; the same call goes on with what is left")
    return out


def report(folder: Path, into: Path | None, block: str) -> int:
    """Print the table, or put it into a file; 1 where something in it may not be compared."""
    records = read_measured(folder)
    if importlib.util.find_spec("tabulate") is None:
        print(f"no table: tabulate is not installed; --report {folder} makes it where it is", file=sys.stderr)
        return 0
    from comparison import problems, table

    if into is None:
        print(table(records))
    elif found := problems(records):
        raise RecordError(f"{into} was left as it is: {found[0]}")
    else:
        from peftbench.report.tables.table import insert_block

        insert_block(table(records), into, block)
    return int(bool(problems(records)))


def main() -> int:
    """Measure and report, or report alone."""
    given = parsed()
    try:
        return report(given.report or measure(given), given.into, given.block)
    except PeftbenchError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: records so far are kept; the same call goes on with the others", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
