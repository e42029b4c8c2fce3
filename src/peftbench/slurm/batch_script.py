"""The text of a job's script: one task a run, told before its time is up, begun anew where it was stopped."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from peftbench.errors import SlurmError
from peftbench.slurm.options import STOP_SIGNAL_FORMAT, parse_lead_seconds

ACCELERATE_CONFIG_FILE, DEEPSPEED_CONFIG_FILE = "accelerate.yaml", "deepspeed.json"
"""In a run's folder: the engine's files, as they were when it was submitted."""
_BASE_PORT = 29500


@dataclass(frozen=True)
class Job:
    """What one script runs."""

    name: str
    run_dirs: tuple[Path, ...]
    """Of the runs, absolute, each with its recipe."""
    log_dir: Path
    """Folder for what is printed."""
    options: dict[str, str | None] = field(default_factory=dict)
    """For sbatch, beyond those that are set here."""
    nodes: int = 1
    gpus_per_node: int = 0
    processes_per_node: int = 1
    uses_accelerate: bool = False
    """Whether accelerate launches it, with the file in each run's folder."""
    uses_deepspeed: bool = False
    max_parallel: int | None = None
    """How many runs may be under way together, None for all."""
    max_requeues: int = 10
    """How often a job that was stopped for its time begins anew."""
    python: str = sys.executable
    working_dir: Path = field(default_factory=Path.cwd)
    """Folder that it runs in, to which a recipe's paths are relative."""

    def __post_init__(self) -> None:
        for text in (self.name, *map(str, (*self.run_dirs, self.log_dir, self.working_dir))):
            if any(ord(character) < ord(" ") for character in text):
                raise SlurmError(f"{text!r} holds a character that no job's script can; give another name")
        if "\\" in str(self.log_dir):  # which tells SLURM to take the % in a log's name for itself
            raise SlurmError(
                f"{str(self.log_dir)!r} holds a backslash, which no log of SLURM's can; give another --out"
            )

    @property
    def is_array(self) -> bool:
        """Whether it is an array."""
        return len(self.run_dirs) > 1


def render_script(job: Job) -> str:
    """The script as sbatch reads it; nothing in it is expanded that was given by a user."""
    lines = [
        f"#SBATCH --{name}" + ("" if value is None else f"={_quote_value(value)}")
        for name, value in build_sbatch_directives(job).items()
    ]
    return "\n".join(["#!/bin/bash", *lines, "", *_render_body(job), ""])


def build_sbatch_directives(job: Job) -> dict[str, str | None]:
    """All options of sbatch for it; None for one that stands alone."""
    last = len(job.run_dirs) - 1
    at_once = f"%{job.max_parallel}" if job.max_parallel else ""
    return {
        "job-name": job.name,
        **({"array": f"0-{last}{at_once}"} if job.is_array else {}),
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        **({"gpus-per-node": str(job.gpus_per_node)} if job.gpus_per_node else {}),
        "output": str(job.log_dir).replace("%", "%%") + ("/%A_%a.log" if job.is_array else "/%j.log"),
        "open-mode": "append",
        "chdir": str(job.working_dir),
        **({} if "no-requeue" in job.options else {"requeue": None}),
        "signal": STOP_SIGNAL_FORMAT.format(parse_lead_seconds(job.options)),
        **{name: value for name, value in job.options.items() if name != "signal"},
    }


def _quote_value(value: str) -> str:
    """For sbatch, which reads its lines much as a shell does, without expanding anything."""
    if all(character.isalnum() or character in "_-.,:/@%+=*[]" for character in value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _render_body(job: Job) -> list[str]:
    python = shlex.quote(job.python)
    again = f'exec {python} -m peftbench.slurm.requeue --at-most {job.max_requeues} --code "$code" "$folder"'
    return [
        "# One folder a run, with its recipe and whatever else it needs.",
        "folders=(",
        *(f"  {shlex.quote(str(folder))}" for folder in job.run_dirs),
        ")",
        "folder=${folders[${SLURM_ARRAY_TASK_ID:-0}]}",
        "",
        "# SLURM tells this script alone that its time is nearly up; a file tells the run, on however many nodes.",
        "export PEFTBENCH_JOB=${SLURM_JOB_ID}-${SLURM_RESTART_COUNT:-0}",
        f"export PEFTBENCH_STOP_LEAD={parse_lead_seconds(job.options)}",
        "# srun gives a task one CPU unless it is told how many the job has for it (since SLURM 22.05).",
        '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK',
        "export SLURM_EXPORT_ENV=ALL  # whatever the job was given, its steps are given all of it",
        "told=",
        """trap 'told=1; echo SIGUSR1 >"$folder/.stop-$PEFTBENCH_JOB"' USR1""",
        "",
        *_render_launch(job, python),
        "run=$!",
        'wait "$run"; code=$?',
        'while kill -0 "$run" 2>/dev/null; do wait "$run"; code=$?; done  # a signal ends a wait, and not the run',
        'wait "$run"; code=$?  # which it may have ended just before the run did',
        "",
        'rm -f "$folder/.stop-$PEFTBENCH_JOB"',
        *(
            []
            if "no-requeue" in job.options
            else [
                "# It kept its last step: begin anew where it was stopped, but not for ever.",
                f'if [ -n "$told" ]; then {again}; fi',
            ]
        ),
        'exit "$code"',
    ]


def _render_launch(job: Job, python: str) -> list[str]:
    if not job.uses_accelerate:
        return [f'srun {python} -m peftbench.train --unless-finished --config "$folder/recipe.yaml" &']
    several = [
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"port=$(({_BASE_PORT} + SLURM_JOB_ID % 1000))",
        "export head port folder",
    ]
    machines = [
        '--machine_rank "$SLURM_NODEID"',
        '--main_process_ip "$head"',
        '--main_process_port "$port"',
        "--rdzv_backend c10d",
        '--rdzv_conf "is_host=$((SLURM_NODEID == 0))"',  # torch would guess it from names
        *(["--deepspeed_multinode_launcher standard"] if job.uses_deepspeed else []),
    ]
    launch = [
        f"{python} -m accelerate.commands.launch --quiet",
        f'--config_file "$folder/{ACCELERATE_CONFIG_FILE}"',
        *(machines if job.nodes > 1 else ["--main_process_port 0"]),
        '-m peftbench.train --unless-finished --config "$folder/recipe.yaml"',
    ]
    if job.nodes == 1:
        return [f"srun {' '.join(launch)} &"]
    return [*several, f"srun --kill-on-bad-exit=1 bash -c {shlex.quote('exec ' + ' '.join(launch))} &"]
