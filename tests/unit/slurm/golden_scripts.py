"""The expected batch scripts. To rewrite them: python -m tests.unit.slurm.golden_scripts"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from peftbench.slurm.batch_script import Job, render_script

GOLDEN_DIR = Path(__file__).parent / "scripts"
REFRESH = "python -m tests.unit.slurm.golden_scripts"
_RUNS = tuple(Path(PurePosixPath("/runs/demo") / name) for name in ("lora", "full", "it's $(mine)"))
_LOG_DIR, _PYTHON, _WORKING_DIR = Path("/runs/demo/slurm"), "/venv/bin/python", Path("/home/me/my project")

SCRIPTS: dict[str, Job] = {
    "one": Job(
        name="lora", run_dirs=_RUNS[:1], log_dir=_LOG_DIR, gpus_per_node="1", python=_PYTHON, working_dir=_WORKING_DIR
    ),
    "one_on_cpu": Job(
        name="lora", run_dirs=_RUNS[:1], log_dir=_LOG_DIR, python=_PYTHON, working_dir=_WORKING_DIR, max_requeues=0
    ),
    "array": Job(
        name="a demo",
        run_dirs=_RUNS,
        log_dir=_LOG_DIR,
        gpus_per_node="1",
        python=_PYTHON,
        working_dir=_WORKING_DIR,
        max_parallel=2,
        options={"partition": "gpu", "time": "4:00:00", "signal": "B:USR1@300", "comment": 'a "b"', "exclusive": None},
    ),
    "prologue": Job(
        name="lora",
        run_dirs=_RUNS[:1],
        log_dir=_LOG_DIR,
        gpus_per_node="a100:1",
        prologue=(
            "module load cuda/12  # a comment",
            'source "$HOME/conda.sh"',
            "if true; then\n  :\nfi",
        ),
        python=_PYTHON,
        working_dir=_WORKING_DIR,
    ),
    "not_requeued": Job(
        name="x",
        run_dirs=_RUNS[:1],
        log_dir=_LOG_DIR,
        options={"no-requeue": None},
        python=_PYTHON,
        working_dir=_WORKING_DIR,
    ),
    "several_gpus": Job(
        name="zero2",
        run_dirs=_RUNS[:1],
        log_dir=_LOG_DIR,
        gpus_per_node="4",
        processes_per_node=4,
        uses_accelerate=True,
        uses_deepspeed=True,
        python=_PYTHON,
        working_dir=_WORKING_DIR,
    ),
    "several_machines": Job(
        name="zero2",
        run_dirs=_RUNS,
        log_dir=_LOG_DIR,
        nodes=2,
        gpus_per_node="4",
        processes_per_node=4,
        uses_accelerate=True,
        uses_deepspeed=True,
        python=_PYTHON,
        working_dir=_WORKING_DIR,
    ),
    "several_machines_ddp": Job(
        name="ddp",
        run_dirs=_RUNS[:1],
        log_dir=_LOG_DIR,
        nodes=3,
        gpus_per_node="8",
        processes_per_node=8,
        uses_accelerate=True,
        python=_PYTHON,
        working_dir=_WORKING_DIR,
    ),
}
"""One job of each kind."""


def main() -> None:
    """Write all scripts."""
    GOLDEN_DIR.mkdir(exist_ok=True)
    for path in GOLDEN_DIR.glob("*.sbatch"):
        path.unlink()
    for name, job in SCRIPTS.items():
        (GOLDEN_DIR / f"{name}.sbatch").write_text(render_script(job), encoding="utf-8")


if __name__ == "__main__":
    main()
