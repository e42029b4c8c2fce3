"""Keeps the scripts that jobs are given, so that a change is seen. Run: python -m tests.slurm.record"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from peftbench.slurm.batch_script import Job, render_script

KEPT = Path(__file__).parent / "scripts"
REFRESH = "python -m tests.slurm.record"
_RUNS = tuple(Path(PurePosixPath("/runs/demo") / name) for name in ("lora", "full", "it's $(mine)"))
_LOGS, _PYTHON, _PLACE = Path("/runs/demo/slurm"), "/venv/bin/python", Path("/home/me/my project")

SCRIPTS: dict[str, Job] = {
    "one": Job(name="lora", folders=_RUNS[:1], logs=_LOGS, gpus_per_node=1, python=_PYTHON, place=_PLACE),
    "one_on_cpu": Job(name="lora", folders=_RUNS[:1], logs=_LOGS, python=_PYTHON, place=_PLACE, restarts=0),
    "array": Job(
        name="a demo", folders=_RUNS, logs=_LOGS, gpus_per_node=1, python=_PYTHON, place=_PLACE,
        at_once=2,
        options={"partition": "gpu", "time": "4:00:00", "signal": "B:USR1@300", "comment": 'a "b"', "exclusive": None},
    ),
    "not_requeued": Job(
        name="x", folders=_RUNS[:1], logs=_LOGS, options={"no-requeue": None}, python=_PYTHON, place=_PLACE,
    ),
    "several_gpus": Job(
        name="zero2", folders=_RUNS[:1], logs=_LOGS, gpus_per_node=4, processes_per_node=4, launched=True,
        deepspeed=True, python=_PYTHON, place=_PLACE,
    ),
    "several_machines": Job(
        name="zero2", folders=_RUNS, logs=_LOGS, nodes=2, gpus_per_node=4, processes_per_node=4, launched=True,
        deepspeed=True, python=_PYTHON, place=_PLACE,
    ),
    "several_machines_ddp": Job(
        name="ddp", folders=_RUNS[:1], logs=_LOGS, nodes=3, gpus_per_node=8, processes_per_node=8, launched=True,
        python=_PYTHON, place=_PLACE,
    ),
}  # fmt: skip
"""One of each kind."""


def main() -> None:
    """Write them all."""
    KEPT.mkdir(exist_ok=True)
    for path in KEPT.glob("*.sbatch"):
        path.unlink()
    for name, job in SCRIPTS.items():
        (KEPT / f"{name}.sbatch").write_text(render_script(job), encoding="utf-8")


if __name__ == "__main__":
    main()
