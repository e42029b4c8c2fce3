"""The batch script of a job: one task per run, stopped before the time limit and requeued."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from peftbench.errors import SlurmError
from peftbench.slurm.gpus import GPUS_PER_NODE
from peftbench.slurm.options import STOP_SIGNAL_FORMAT, parse_lead_seconds

ACCELERATE_CONFIG_FILE, DEEPSPEED_CONFIG_FILE = "accelerate.yaml", "deepspeed.json"
"""Copies of the engine's config files in a run's folder, as they were at submission."""
_BASE_PORT = 29500


@dataclass(frozen=True)
class Job:
    """The runs of one batch script."""

    name: str
    run_dirs: tuple[Path, ...]
    """Absolute run folders, each with its recipe."""
    log_dir: Path
    """Folder of the job's logs."""
    options: dict[str, str | None] = field(default_factory=dict)
    """sbatch options in addition to those that peftbench sets."""
    nodes: int = 1
    gpus_per_node: str = ""
    """Value of sbatch's option, e.g. "4" or "a100:4"; empty if the job needs no GPU or another option requests them."""
    prologue: tuple[str, ...] = ()
    """Shell commands before the run, e.g. ``module load cuda``; the job ends if one fails."""
    processes_per_node: int = 1
    uses_accelerate: bool = False
    """True if accelerate launches the runs, with the config file in each run's folder."""
    uses_deepspeed: bool = False
    max_parallel: int | None = None
    """Maximum number of concurrent array tasks, None for no limit."""
    max_requeues: int = 10
    """Maximum number of requeues after the time limit."""
    python: str = sys.executable
    working_dir: Path = field(default_factory=Path.cwd)
    """Working directory of the job, to which a recipe's paths are relative."""

    def __post_init__(self) -> None:
        for text in (self.name, *map(str, (*self.run_dirs, self.log_dir, self.working_dir))):
            if any(ord(character) < ord(" ") for character in text):
                raise SlurmError(
                    f"{text!r} has a control character, which a batch script cannot contain; give another name"
                )
        if "\\" in str(self.log_dir):  # SLURM would not expand the % in a log's name
            raise SlurmError(
                f"{str(self.log_dir)!r} has a backslash, which SLURM does not allow in log paths; give another --out"
            )

    @property
    def is_array(self) -> bool:
        """True if the job is an array."""
        return len(self.run_dirs) > 1


def render_script(job: Job) -> str:
    """Return the script for sbatch. Names and paths are quoted, so that the shell expands nothing in them."""
    lines = [
        f"#SBATCH --{name}" + ("" if value is None else f"={_quote_value(value)}")
        for name, value in build_sbatch_directives(job).items()
    ]
    return "\n".join(["#!/bin/bash", *lines, "", *_render_body(job), ""])


def build_sbatch_directives(job: Job) -> dict[str, str | None]:
    """Return all sbatch options of the job; the value None marks a flag."""
    last = len(job.run_dirs) - 1
    limit = f"%{job.max_parallel}" if job.max_parallel else ""
    return {
        "job-name": job.name,
        **({"array": f"0-{last}{limit}"} if job.is_array else {}),
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        **({GPUS_PER_NODE: job.gpus_per_node} if job.gpus_per_node else {}),
        "output": str(job.log_dir).replace("%", "%%") + ("/%A_%a.log" if job.is_array else "/%j.log"),
        "open-mode": "append",
        "chdir": str(job.working_dir),
        **({} if "no-requeue" in job.options else {"requeue": None}),
        "signal": STOP_SIGNAL_FORMAT.format(parse_lead_seconds(job.options)),
        **{name: value for name, value in job.options.items() if name != "signal"},
    }


def _quote_value(value: str) -> str:
    """Return a value quoted for an #SBATCH line, which sbatch splits like a shell but without expansion."""
    if all(character.isalnum() or character in "_-.,:/@%+=*[]" for character in value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _render_body(job: Job) -> list[str]:
    python = shlex.quote(job.python)
    requeue = f'exec {python} -m peftbench.slurm.requeue --max-requeues {job.max_requeues} --code "$code" "$folder"'
    return [
        "# One folder per run, with its recipe and the engine's config files.",
        "folders=(",
        *(f"  {shlex.quote(str(folder))}" for folder in job.run_dirs),
        ")",
        "folder=${folders[${SLURM_ARRAY_TASK_ID:-0}]}",
        "",
        "# Before the time limit SLURM signals only this script. A file passes the stop request on to all nodes.",
        "export PEFTBENCH_JOB=${SLURM_JOB_ID}-${SLURM_RESTART_COUNT:-0}",
        f"export PEFTBENCH_STOP_LEAD={parse_lead_seconds(job.options)}",
        "# Since SLURM 22.05, srun gives a task one CPU unless SRUN_CPUS_PER_TASK is set.",
        '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK',
        "export SLURM_EXPORT_ENV=ALL  # job steps get the whole environment, whatever --export is",
        "stop_requested=",
        """trap 'stop_requested=1; echo SIGUSR1 >"$folder/.stop-$PEFTBENCH_JOB"' USR1""",
        *_render_prologue(job),
        "",
        *_render_launch(job, python),
        "run=$!",
        'wait "$run"; code=$?',
        'while kill -0 "$run" 2>/dev/null; do wait "$run"; code=$?; done  # a signal interrupts wait, not the run',
        'wait "$run"; code=$?  # the run may have ended right after such a signal',
        "",
        'rm -f "$folder/.stop-$PEFTBENCH_JOB"',
        *(
            []
            if "no-requeue" in job.options
            else [
                "# Requeue the stopped run; it resumes from its last checkpoint.",
                f'if [ -n "$stop_requested" ]; then {requeue}; fi',
            ]
        ),
        'exit "$code"',
    ]


def _render_prologue(job: Job) -> list[str]:
    if not job.prologue:
        return []
    checked = [line for command in job.prologue for line in (command, '[ "$?" = 0 ] || exit 1')]
    return ["", "# slurm.prologue. The job ends if a command fails.", *checked]


def _render_launch(job: Job, python: str) -> list[str]:
    if not job.uses_accelerate:
        return [f'srun {python} -m peftbench.train --skip-finished --config "$folder/recipe.yaml" &']
    rendezvous = [
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"port=$(({_BASE_PORT} + SLURM_JOB_ID % 1000))",
        "export head port folder",
    ]
    multi_node = [
        '--machine_rank "$SLURM_NODEID"',
        '--main_process_ip "$head"',
        '--main_process_port "$port"',
        "--rdzv_backend c10d",
        '--rdzv_conf "is_host=$((SLURM_NODEID == 0))"',  # torch would derive it from host names
        *(["--deepspeed_multinode_launcher standard"] if job.uses_deepspeed else []),
    ]
    launch = [
        f"{python} -m accelerate.commands.launch --quiet",
        f'--config_file "$folder/{ACCELERATE_CONFIG_FILE}"',
        *(multi_node if job.nodes > 1 else ["--main_process_port 0"]),
        '-m peftbench.train --skip-finished --config "$folder/recipe.yaml"',
    ]
    if job.nodes == 1:
        return [f"srun {' '.join(launch)} &"]
    return [*rendezvous, f"srun --kill-on-bad-exit=1 bash -c {shlex.quote('exec ' + ' '.join(launch))} &"]
