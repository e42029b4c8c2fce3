"""Submit runs to SLURM: write the files that they need to their folders, then submit one job or job array."""

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
from peftbench.distributed.accelerate_config import find_accelerate_config, read_accelerate_config
from peftbench.errors import MissingFileError, OutputError, SlurmError
from peftbench.recipe.loader import to_commented_yaml
from peftbench.recipe.schema import Recipe
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.lock import raise_if_locked
from peftbench.run_dir.refusal import delete_refusal
from peftbench.slurm.batch_script import (
    ACCELERATE_CONFIG_FILE,
    DEEPSPEED_CONFIG_FILE,
    Job,
    build_sbatch_directives,
    render_script,
)
from peftbench.slurm.job_file import JobFile

SCRIPT_FILE, LOG_DIR = "job{}.sbatch", "slurm"
"""The braces are empty for one job; several are numbered."""
_INHERITED_VARIABLES = frozenset({"SLURM_CONF", "SLURM_CLUSTERS"})


@dataclass(frozen=True)
class Submission:
    """The files written for a job, and its id once submitted."""

    script_path: Path
    script_text: str
    run_dirs: tuple[Path, ...]
    log_dir: Path
    sbatch_args: tuple[str, ...] = ()
    """The script's options as sbatch arguments: SBATCH_* environment variables override the script, not arguments."""
    job_id: str | None = None


@dataclass(frozen=True)
class LaunchFile:
    """An accelerate config file and its content."""

    path: Path
    config: dict[str, Any]

    @property
    def deepspeed_config_path(self) -> Path | None:
        """The DeepSpeed config file that it names, None if it names none."""
        inner = self.config.get("deepspeed_config") or {}
        if not isinstance(inner, dict):
            raise SlurmError(f"{self.path}: deepspeed_config must be a mapping")
        name = inner.get("deepspeed_config_file")
        if name is None:
            return None
        paths = [path for path in (Path(name), self.path.resolve().parent.parent / name) if path.is_file()]
        if not paths:
            raise MissingFileError(f"{self.path} names the DeepSpeed config {name}, which does not exist")
        return paths[0].resolve()

    @property
    def processes_per_node(self) -> int:
        """Number of processes per node in the config file."""
        try:
            machines = int(self.config.get("num_machines") or 1)
            return max(1, int(self.config.get("num_processes") or 1) // machines)
        except (TypeError, ValueError):
            raise SlurmError(f"{self.path}: num_processes and num_machines must be whole numbers") from None


def find_launch_file(name: str) -> LaunchFile:
    """Return the accelerate config of that name in ``accel_configs/``, or at that path.

    Raises:
        MissingFileError: the file does not exist.
        EngineError: the file is not valid.
    """
    path = find_accelerate_config(name)
    return LaunchFile(path, read_accelerate_config(path))


def prepare_submissions(
    recipes: Sequence[Recipe], jobs: Sequence[Job], launch_file: LaunchFile | None, script_dir: Path
) -> list[Submission]:
    """Write the resolved recipes, the engine's config files and the batch script of each job. Submit nothing.

    ``recipes`` are those of the jobs' run folders, in order.

    Raises:
        RunLockedError: another process works in one of the folders.
        OutputError: a folder cannot be written.
    """
    runs = [(job, folder) for job in jobs for folder in job.run_dirs]
    for _, folder in runs:
        raise_if_locked(folder)
    for recipe, (job, folder) in zip(recipes, runs, strict=True):
        absolute = recipe.model_copy(update={"output_dir": str(folder.parent)})
        write_atomically(RunDir(folder).recipe_file, to_commented_yaml(absolute))
        delete_refusal(folder)
        if launch_file is not None:
            _write_launch_files(launch_file, folder, job)
    names = [SCRIPT_FILE.format("")] if len(jobs) == 1 else [SCRIPT_FILE.format(f"-{n + 1}") for n in range(len(jobs))]
    return [_write_script(job, script_dir / name) for job, name in zip(jobs, names, strict=True)]


def _write_script(job: Job, path: Path) -> Submission:
    text = render_script(job)
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
        "same_network": False,  # otherwise accelerate passes no rendezvous endpoint to c10d
    }
    if (deepspeed := launch_file.deepspeed_config_path) is not None:
        write_atomically(run_dir / DEEPSPEED_CONFIG_FILE, deepspeed.read_text(encoding="utf-8"))
        config["deepspeed_config"] = {
            **config["deepspeed_config"],
            "deepspeed_config_file": str(run_dir / DEEPSPEED_CONFIG_FILE),
        }
    write_atomically(run_dir / ACCELERATE_CONFIG_FILE, yaml.safe_dump(config, sort_keys=False))


def submit_jobs(submissions: Sequence[Submission]) -> list[Submission]:
    """Submit each script with sbatch, in order.

    Raises:
        SlurmError: sbatch does not exist or refuses a script; the message names the jobs submitted before.
    """
    submitted: list[Submission] = []
    for submission in submissions:
        try:
            submitted.append(submit_job(submission))
        except SlurmError as error:
            if not submitted:
                raise
            jobs = ", ".join(str(one.job_id) for one in submitted)
            raise SlurmError(
                f"{error} (submitted before: job {jobs})", "run the same command again to submit the other runs"
            ) from error
    return submitted


def submit_job(submission: Submission) -> Submission:
    """Submit the script with sbatch.

    Raises:
        SlurmError: sbatch does not exist or refuses the script.
    """
    if shutil.which("sbatch") is None:
        raise SlurmError(
            f"no sbatch on this machine; submit {submission.script_path} on a machine with SLURM, or run the suite "
            "here with peftbench run"
        )
    # If this process is itself in a job, its task id, restart count and CPUs must not reach the new job.
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
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise SlurmError(f"sbatch refused {submission.script_path}: {' '.join(done.stderr.split())}")
    job_id = done.stdout.strip().split(";")[0]
    for index, folder in enumerate(submission.run_dirs):
        name = f"{job_id}_{index}" if len(submission.run_dirs) > 1 else job_id
        try:
            JobFile(job_id=name, log_path=str(submission.log_dir / f"{name}.log")).write(folder)
        except OutputError as error:
            raise SlurmError(f"job {job_id} was submitted, but its job file cannot be written: {error}") from error
    return replace(submission, job_id=job_id)
