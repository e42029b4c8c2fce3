"""The scripts in launch/slurm run unmodified on a real SLURM cluster, and one run trains on two nodes."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.paths import REPOSITORY
from tests.helpers.project import RECIPE, ROWS
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.suites import peftbench, read_statuses, record

pytestmark = [
    pytest.mark.xdist_group("slurm"),
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.multiprocess,
    pytest.mark.timeout(900),
]
HOSTILE = "an out 50%j; $(touch executed) 'folder'"
SMALL = ["--cpus-per-task=1", "--time=10"]
"""Options that replace those of a script, because the nodes of the test cluster have two CPUs."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a folder with the repository's scripts, two recipes and a ZeRO-2 config for CPUs."""
    for name in ("launch", "ds_configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    for name in ("first", "second"):
        values = RECIPE | {"name": name, "train": {"steps": 4, "global_batch_size": 4}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    engine = yaml.safe_load((REPOSITORY / "accel_configs" / "zero2.yaml").read_text(encoding="utf-8"))
    (tmp_path / "zero2_cpu.yaml").write_text(yaml.safe_dump(engine | {"use_cpu": True}), encoding="utf-8")
    return tmp_path


def submit_script(project: Path, slurm: Cluster, caches: dict[str, str], *arguments: str) -> str:
    """Submit a script with sbatch from the project's folder, and return the job id."""
    environment = caches | {key: value for key, value in slurm.environment.items() if key not in caches}
    environment |= {"PEFTBENCH_PYTHON": sys.executable, "SLURM_CONF": slurm.environment["SLURM_CONF"]}
    submitter = Cluster(slurm.folder, environment | {"PATH": slurm.environment["PATH"]})
    return submitter.run("sbatch", "--parsable", f"--chdir={project}", *arguments).strip()


def run_script(project: Path, slurm: Cluster, caches: dict[str, str], *arguments: str) -> str:
    """Submit a script, wait for the end of its job, and return the logs."""
    submit_script(project, slurm, caches, *arguments)
    slurm.await_empty(600)
    return read_logs(project)


def read_logs(project: Path) -> str:
    """Return the logs of all jobs."""
    return "".join(path.read_text(encoding="utf-8") for path in sorted(project.glob("*.log")))


def assert_outcome_is_ok(project: Path, name: str, log: str, out: str = "out") -> dict[str, Any]:
    """Check that a run of four steps has ended as ok, and return its record. ``log`` is shown if not."""
    assert (project / out / name / "record.json").exists(), log
    values = record(project / out, name)
    assert values["outcome"]["kind"] == "ok", log
    assert len(values["step_losses"]) == 4
    assert not list((project / out / name).glob(".stop*"))
    return values


def test_every_script_is_tested() -> None:
    """A new script in launch/slurm needs a test in this file."""
    names = {path.stem for path in (REPOSITORY / "launch" / "slurm").glob("*.sbatch")}
    assert names == {"single_gpu", "multi_gpu", "multi_node", "array"}


def test_single_gpu_script_keeps_an_existing_result(project: Path, slurm: Cluster, caches: dict[str, str]) -> None:
    """Overrides reach the recipe, a second submission keeps the result, and shell syntax in a path is not executed."""
    arguments = [*SMALL, "launch/slurm/single_gpu.sbatch", "first.yaml", f"output_dir={HOSTILE}"]
    assert_outcome_is_ok(project, "first", run_script(project, slurm, caches, *arguments), HOSTILE)
    before = record(project / HOSTILE, "first")["started_at"]
    assert "first already has a result" in run_script(project, slurm, caches, *arguments)
    assert record(project / HOSTILE, "first")["started_at"] == before
    assert not (project / "executed").exists()


def test_signaled_single_gpu_script_is_requeued(project: Path, slurm: Cluster, caches: dict[str, str]) -> None:
    """After the stop signal the run saves a checkpoint, requeues its job, and resumes."""
    arguments = [*SMALL, "launch/slurm/single_gpu.sbatch", "first.yaml", "train.steps=300"]
    job = submit_script(project, slurm, caches, *arguments)
    wait_until(lambda: read_step(project / "out" / "first") > 2, 120, slurm.logs)
    slurm.send("scancel", "--batch", "--signal=USR1", job)
    slurm.await_empty(300)
    values = record(project / "out", "first")
    assert values["outcome"]["kind"] == "ok", read_logs(project)
    assert len(values["resumed_after"]) == 1
    assert f"requeued job {job} (requeue 1 of 10), resuming after step {values['resumed_after'][0]}" in read_logs(
        project
    )


def read_step(folder: Path) -> int:
    """Return the step in a run's status file, 0 if it has none."""
    with suppress(OSError, ValueError):
        return int(json.loads((folder / "status.json").read_text(encoding="utf-8"))["step"])
    return 0


def test_array_script_runs_one_task_per_recipe(project: Path, slurm: Cluster, caches: dict[str, str]) -> None:
    """Each recipe has a record with the outcome ok."""
    arguments = [*SMALL, "--array=0-1", "launch/slurm/array.sbatch", "first.yaml", "second.yaml"]
    log = run_script(project, slurm, caches, *arguments)
    for name in ("first", "second"):
        assert_outcome_is_ok(project, name, log)


@pytest.mark.parametrize(("script", "gpus"), [("multi_gpu", 2), ("multi_node", 1)])
def test_multi_gpu_and_multi_node_scripts_start_two_processes(
    script: str, gpus: int, project: Path, slurm: Cluster, caches: dict[str, str]
) -> None:
    """Two processes train with ZeRO-2, on one node and on two."""
    environment = caches | {"PEFTBENCH_ENGINE": "zero2_cpu.yaml"}
    arguments = [*SMALL, f"--gpus-per-node={gpus}", f"launch/slurm/{script}.sbatch", "first.yaml"]
    values = assert_outcome_is_ok(project, "first", run_script(project, slurm, environment, *arguments))
    assert (values["engine"]["name"], values["device"]["num_processes"]) == ("zero2", 2)


def test_run_on_two_nodes_matches_one_node(project: Path, slurm: Cluster, caches: dict[str, str]) -> None:
    """One command submits the run. After a stop signal it is requeued on both nodes, and its losses match."""
    environment = caches | slurm.environment
    arguments = ["first.yaml", "--accelerate", "zero2_cpu.yaml", "train.steps=300"]
    one = peftbench(project, environment, "submit", *arguments, "--gpus-per-node", "0", "--out", "one")
    assert one.returncode == 0, one.stderr
    slurm.await_empty(300)
    two = peftbench(
        project,
        environment,
        "submit",
        *arguments,
        "--gpus-per-node",
        "1",
        "--nodes",
        "2",
        "--out",
        "two",
        "slurm.cpus_per_task=2",
    )
    assert two.returncode == 0, two.stderr
    job = two.stdout.split()[2].rstrip(":")
    wait_until(lambda: read_step(project / "two" / "first") > 2, 120, slurm.logs)
    (row,) = read_statuses(project, "two", environment)
    assert (row["state"], row["total_steps"]) == ("running", 300)
    assert "NumNodes=2 NumCPUs=4" in slurm.run("scontrol", "show", "job", job)
    assert "CPUs=4" in slurm.run("scontrol", "show", "step", f"{job}.0")
    slurm.send("scancel", "--batch", "--signal=USR1", job)
    slurm.await_empty(300)
    log = "".join(path.read_text(encoding="utf-8") for path in (project / "two").rglob("*.log"))
    one_node, two_nodes = record(project / "one", "first"), record(project / "two", "first")
    assert two_nodes["outcome"]["kind"] == "ok", log
    assert len(two_nodes["resumed_after"]) == 1, log
    assert two_nodes["step_losses"] == pytest.approx(one_node["step_losses"], rel=1e-6)
