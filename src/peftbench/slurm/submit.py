"""Submits runs to SLURM: what they need is written into their folders first, then one job an array, or one a run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from peftbench.common.filesystem import write_atomically, write_error
from peftbench.errors import MissingFileError, OutputError, SlurmError, did_you_mean
from peftbench.recipe.loader import to_commented_yaml
from peftbench.recipe.schema import Recipe
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.lock import raise_if_locked
from peftbench.slurm.batch_script import (
    ACCELERATE_CONFIG_FILE,
    DEEPSPEED_CONFIG_FILE,
    Job,
    build_sbatch_directives,
    render_script,
)
from peftbench.slurm.job_file import JobFile

SCRIPT_FILE, LOG_DIR = "job.sbatch", "slurm"
_INHERITED_VARIABLES = frozenset({"SLURM_CONF", "SLURM_CLUSTERS"})
_ACCELERATE_CONFIG_DIR = "accel_configs"


@dataclass(frozen=True)
class Submission:
    """What was written, and what SLURM called it."""

    script_path: Path
    script_text: str
    run_dirs: tuple[Path, ...]
    log_dir: Path
    sbatch_args: tuple[str, ...] = ()
    """Its options, once more, for sbatch: what the environment says would come before the script's."""
    job_id: str | None = None


@dataclass(frozen=True)
class LaunchFile:
    """An accelerate file, and what it says of a launch."""

    path: Path
    config: dict[str, Any]

    @property
    def deepspeed_config_path(self) -> Path | None:
        """The DeepSpeed file that it names."""
        inner = self.config.get("deepspeed_config") or {}
        if not isinstance(inner, dict):
            raise SlurmError(f"{self.path}: deepspeed_config must hold keys and values")
        named = inner.get("deepspeed_config_file")
        if named is None:
            return None
        found = [place for place in (Path(named), self.path.resolve().parent.parent / named) if place.is_file()]
        if not found:
            raise MissingFileError(f"{self.path} names the DeepSpeed file {named}, and there is none")
        return found[0].resolve()

    @property
    def processes_per_node(self) -> int:
        """Of each machine, as the file has it."""
        try:
            machines = int(self.config.get("num_machines") or 1)
            return max(1, int(self.config.get("num_processes") or 1) // machines)
        except (TypeError, ValueError):
            raise SlurmError(f"{self.path}: num_processes and num_machines must be whole numbers") from None


def find_launch_file(name: str) -> LaunchFile:
    """The engine of a file, or of that name in ``accel_configs/``.

    Raises:
        MissingFileError: there is none.
    """
    known = {path.stem: path for folder in _find_accelerate_config_dirs() for path in sorted(folder.glob("*.yaml"))}
    path = known.get(name) or Path(name)
    if not path.is_file():
        raise MissingFileError(
            f"there is no engine {name!r}", did_you_mean(name, known) if known else "give a file's path"
        )
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SlurmError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise SlurmError(f"{path} must hold keys and values, as accelerate config writes them")
    return LaunchFile(path, config)


def _find_accelerate_config_dirs() -> list[Path]:
    return [
        folder / _ACCELERATE_CONFIG_DIR
        for folder in (Path(__file__).resolve().parents[3], Path.cwd())
        if (folder / _ACCELERATE_CONFIG_DIR).is_dir()
    ]


def prepare_submission(
    recipes: Sequence[Recipe], job: Job, launch_file: LaunchFile | None, script_dir: Path
) -> Submission:
    """Write everything that the runs need: resolved recipes, the engine's files, the script. Nothing is submitted.

    Raises:
        BusyError: a run is under way already.
        OutputError: a folder cannot be written.
    """
    for folder in job.run_dirs:
        raise_if_locked(folder)
    for recipe, folder in zip(recipes, job.run_dirs, strict=True):
        absolute = recipe.model_copy(update={"output_dir": str(folder.parent)})
        write_atomically(RunDir(folder).recipe_file, to_commented_yaml(absolute))
        if launch_file is not None:
            _write_launch_files(launch_file, folder, job)
    text = render_script(job)
    path = script_dir / SCRIPT_FILE
    try:
        job.log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(job.log_dir, error) from error
    write_atomically(path, text)
    arguments = [
        f"--{name}" + ("" if value is None else f"={value}") for name, value in build_sbatch_directives(job).items()
    ]
    return Submission(path, text, job.run_dirs, job.log_dir, tuple(arguments))


def _write_launch_files(launch_file: LaunchFile, run_dir: Path, job: Job) -> None:
    config = launch_file.config | {
        "num_machines": job.nodes,
        "num_processes": job.nodes * job.processes_per_node,
        "same_network": False,  # accelerate tells c10d where to meet only then
    }
    if (deepspeed := launch_file.deepspeed_config_path) is not None:
        write_atomically(run_dir / DEEPSPEED_CONFIG_FILE, deepspeed.read_text(encoding="utf-8"))
        config["deepspeed_config"] = {
            **config["deepspeed_config"],
            "deepspeed_config_file": str(run_dir / DEEPSPEED_CONFIG_FILE),
        }
    write_atomically(run_dir / ACCELERATE_CONFIG_FILE, yaml.safe_dump(config, sort_keys=False))


def submit_job(submission: Submission) -> Submission:
    """Hand the script to sbatch.

    Raises:
        SlurmError: there is none, or it refused.
    """
    if shutil.which("sbatch") is None:
        raise SlurmError(
            f"there is no sbatch on this machine; submit {submission.script_path} where there is SLURM, or run the suite "
            "here with peftbench compare"
        )
    # Of a job that this is submitted from nothing must travel along: a task's number, a count, a step's CPUs.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SRUN_")) or name in _INHERITED_VARIABLES
    }
    done = subprocess.run(
        ["sbatch", "--parsable", *submission.sbatch_args, str(submission.script_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SlurmError(f"sbatch refused {submission.script_path}: {' '.join(done.stderr.split())}")
    job = done.stdout.strip().split(";")[0]
    for index, folder in enumerate(submission.run_dirs):
        name = f"{job}_{index}" if len(submission.run_dirs) > 1 else job
        try:
            JobFile(job_id=name, log_path=str(submission.log_dir / f"{name}.log")).write(folder)
        except OutputError as error:
            raise SlurmError(f"job {job} was submitted, but that cannot be noted: {error}") from error
    return replace(submission, job_id=job)
