"""A suite on a real SLURM cluster: it is interrupted in several ways, and its results equal those of local runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers.project import RECIPE, ROWS
from tests.slurm.cluster import GPU_TYPE, Cluster, wait_until
from tests.slurm.suites import assert_equal_results, peftbench, read_statuses, record

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(2400)]
STEPS = {"short": 6, "requeued": 300, "out_of_time": 1200, "cancelled": 300}
SUITE = {"name": "survivors", "recipes": [f"{name}.yaml" for name in STEPS]}
MINUTES, LEAD = 10, 60
"""Time limit of a job, and the seconds between the stop signal and the time limit."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a folder with a suite of four recipes: one short and three long."""
    folder = tmp_path / "a folder with $(spaces)"
    folder.mkdir()
    for name, steps in STEPS.items():
        train = {"steps": steps, "global_batch_size": 4, "precision": "fp32"}
        model = {"path": "shipped", "attention": "sdpa"}  # submit cannot resolve auto and would submit finished runs
        recipe = RECIPE | {"name": name, "output_dir": "local", "train": train, "model": model}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (folder / "suite.yaml").write_text(yaml.safe_dump(SUITE), encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return folder


def end_at_next_check(slurm: Cluster, job: str) -> None:
    """Shorten the time limit of a running job to 45 to 105 s from now.

    SLURM checks limits every 30 s and sends the stop signal at the first check in the last LEAD + 30 s.
    """
    *_, minutes, seconds = slurm.run("squeue", "--noheader", f"--jobs={job}", "--format=%M").strip().split(":")
    limit = (60 * int(minutes) + int(seconds) + 45) // 60 + 1
    slurm.run("scontrol", "update", f"jobid={job}", f"timelimit={limit}")


def test_interrupted_suite_matches_undisturbed_suite(project: Path, slurm: Cluster, caches: dict[str, str]) -> None:
    """One run is requeued by hand, one reaches its time limit, and one is cancelled and submitted again."""
    environment = caches | slurm.environment | {"OMP_NUM_THREADS": "1"}
    undisturbed = peftbench(project, environment, "run", "suite.yaml")
    assert undisturbed.returncode == 0, undisturbed.stderr

    arguments = [
        "submit",
        "suite.yaml",
        "--out",
        "cluster",
        "--gpus-per-node",
        "0",
        "--max-parallel",
        "2",
        f"slurm.time={MINUTES}",
        f"slurm.signal=B:USR1@{LEAD}",
    ]
    submitted = peftbench(project, environment, *arguments)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.split()[2].rstrip(":")
    runs = project / "cluster"

    def step_of(name: str) -> int:
        try:
            return int(json.loads((runs / name / "status.json").read_text(encoding="utf-8"))["step"])
        except (OSError, ValueError):
            return 0

    wait_until(lambda: step_of("requeued") > 2, 180, slurm.logs)
    slurm.run("scontrol", "requeue", f"{job}_1")
    wait_until(lambda: step_of("cancelled") > 2, 400, slurm.logs)
    slurm.send("scancel", f"{job}_3")
    wait_until(lambda: step_of("out_of_time") > 2, 400, slurm.logs)
    end_at_next_check(slurm, f"{job}_2")
    wait_until(lambda: "Restarts=1" in slurm.run("scontrol", "show", "job", f"{job}_2"), 200, slurm.logs)
    slurm.run("scontrol", "update", f"jobid={job}_2", f"timelimit={MINUTES}")
    slurm.await_empty(900)

    statuses = {row["name"]: row for row in read_statuses(project, "cluster", environment)}
    assert statuses["cancelled"]["state"] == "preempted", statuses
    assert {statuses[name]["state"] for name in ("short", "requeued", "out_of_time")} == {"finished"}, statuses
    assert record(runs, "out_of_time")["resumed_after"], "the run never reached its time limit"
    assert record(runs, "requeued")["resumed_after"], "the run did not resume from its checkpoint"

    again = peftbench(project, environment, *arguments)
    assert again.returncode == 0, again.stderr
    assert "1 run," in again.stdout
    slurm.await_empty(600)
    for name in STEPS:
        assert_equal_results(record(runs, name), record(project / "local", name))
    last_submission = peftbench(project, environment, *arguments)
    assert last_submission.stdout == "nothing left to submit\n", last_submission


def test_time_limit_without_progress_is_an_error(project: Path, slurm: Cluster, caches: dict[str, str]) -> None:
    """An attempt that completes no step is not requeued; its log has the reason."""
    environment = caches | slurm.environment | {"OMP_NUM_THREADS": "1"}
    arguments = ["submit", "requeued.yaml", "--out", "short", "--gpus-per-node", "0", "slurm.time=1"]
    refused = peftbench(project, environment, *arguments)
    assert refused.returncode == 91
    assert "the job is stopped 120 s before its time limit" in refused.stderr
    assert not (project / "short").exists()
    submitted = peftbench(project, environment, *arguments, "slurm.signal=B:USR1@59")
    assert submitted.returncode == 0, submitted.stderr
    wait_until(lambda: "RUNNING" in slurm.queue().values(), 60, slurm.logs)
    # SLURM would send the signal within half a minute; send it here, so that it arrives before training starts.
    slurm.run("scancel", "--batch", "--signal=USR1", submitted.stdout.split()[2].rstrip(":"))
    slurm.await_empty(300)
    log = "".join(path.read_text(encoding="utf-8") for path in (project / "short").rglob("*.log"))
    assert "the job's time limit is too short" in log, log
    assert log.count("the job's time limit is too short") == 1


def test_typed_gpu_prologue_and_refusal(project: Path, slurm: Cluster, caches: dict[str, str]) -> None:
    """A job with a GPU of a type runs its prologue first; a run that is refused on the node keeps its reason."""
    environment = caches | slurm.environment | {"OMP_NUM_THREADS": "1"}
    arguments = ["submit", "short.yaml", "--out", "typed", f"slurm.gres=gpu:{GPU_TYPE}:1", f"slurm.time={MINUTES}"]
    prologue = ['slurm.prologue=test -n "$SLURM_JOB_ID"  # in the job', "slurm.prologue=cp rows.jsonl later.jsonl"]
    data = "data.source.test=later.jsonl"
    submitted = peftbench(project, environment, *arguments, *prologue, data)
    assert submitted.returncode == 0, submitted.stderr
    shown = slurm.run("scontrol", "show", "job", submitted.stdout.split()[2].rstrip(":"))
    assert f"TresPerNode=gres:gpu:{GPU_TYPE}:1" in shown
    slurm.await_empty(300)
    assert record(project / "typed", "short")["outcome"]["kind"] == "ok"
    refused = peftbench(project, environment, *arguments, "slurm.prologue=rm later.jsonl", data, "train.seed=1")
    assert refused.returncode == 0, refused.stderr
    slurm.await_empty(300)
    (row,) = read_statuses(project, "typed", environment)
    assert row["state"] == "refused"
    assert "later.jsonl" in row["detail"]
