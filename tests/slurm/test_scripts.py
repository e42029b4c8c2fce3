"""The scripts to be changed by hand work as they stand; and a run on two nodes of a real SLURM is one run."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.paths import REPOSITORY
from tests.launch.conftest import RECIPE, ROWS
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.suites import peftbench, record, standing

pytestmark = [
    pytest.mark.xdist_group("slurm"),
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.multiprocess,
    pytest.mark.timeout(900),
]
HOSTILE = "an out 50%j; $(touch executed) 'folder'"
SMALL = ["--cpus-per-task=1", "--time=10"]
"""What is asked on the command line instead of what a script says: the nodes here have two CPUs."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder like the repository's, with two recipes and an engine for CPUs."""
    for name in ("launch", "ds_configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    for name in ("first", "second"):
        made = RECIPE | {"name": name, "train": {"steps": 4, "global_batch_size": 4}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(made), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    engine = yaml.safe_load((REPOSITORY / "accel_configs" / "zero2.yaml").read_text(encoding="utf-8"))
    (tmp_path / "zero2_cpu.yaml").write_text(yaml.safe_dump(engine | {"use_cpu": True}), encoding="utf-8")
    return tmp_path


def hand_in(project: Path, slurm: Cluster, caches: dict[str, str], *words: str) -> str:
    """Give a script to sbatch, from the project's folder; its job."""
    environment = caches | {key: value for key, value in slurm.environment.items() if key not in caches}
    environment |= {"PEFTBENCH_PYTHON": sys.executable, "SLURM_CONF": slurm.environment["SLURM_CONF"]}
    there = Cluster(slurm.folder, environment | {"PATH": slurm.environment["PATH"]})
    return there.run("sbatch", "--parsable", f"--chdir={project}", *words).strip()


def handed_in(project: Path, slurm: Cluster, caches: dict[str, str], *words: str) -> str:
    """What the job of a script said, when it is over."""
    hand_in(project, slurm, caches, *words)
    slurm.await_empty(600)
    return logs(project)


def logs(project: Path) -> str:
    """What all jobs of scripts said."""
    return "".join(path.read_text(encoding="utf-8") for path in sorted(project.glob("*.log")))


def assert_ended_well(project: Path, name: str, said: str, out: str = "out") -> dict[str, Any]:
    """The record of a run, for which a job has said in its log that it ended well."""
    assert (project / out / name / "record.json").exists(), said
    found = record(project / out, name)
    assert found["outcome"]["kind"] == "ok", said
    assert len(found["step_losses"]) == 4
    assert not list((project / out / name).glob(".stop*"))
    return found


def test_every_script_is_tested() -> None:
    """One that is added is one to be run here."""
    names = {path.stem for path in (REPOSITORY / "launch" / "slurm").glob("*.sbatch")}
    assert names == {"single_gpu", "multi_gpu", "multi_node", "array"}


def test_single_gpu(project: Path, slurm: Cluster, caches: dict[str, str]) -> None:
    """One run; handed in once more, it leaves the result alone; and a knob reaches the recipe."""
    words = [*SMALL, "launch/slurm/single_gpu.sbatch", "first.yaml", f"output_dir={HOSTILE}"]
    assert_ended_well(project, "first", handed_in(project, slurm, caches, *words), HOSTILE)
    before = record(project / HOSTILE, "first")["started_at"]
    assert "first has its result already" in handed_in(project, slurm, caches, *words)
    assert record(project / HOSTILE, "first")["started_at"] == before
    assert not (project / "executed").exists()


def test_single_gpu_is_told_in_the_middle(project: Path, slurm: Cluster, caches: dict[str, str]) -> None:
    """It keeps its step, begins itself anew, and goes on."""
    words = [*SMALL, "launch/slurm/single_gpu.sbatch", "first.yaml", "train.steps=300"]
    job = hand_in(project, slurm, caches, *words)
    wait_until(lambda: step_of(project / "out" / "first") > 2, 120, slurm.logs)
    slurm.send("scancel", "--batch", "--signal=USR1", job)
    slurm.await_empty(300)
    found = record(project / "out", "first")
    assert found["outcome"]["kind"] == "ok", logs(project)
    assert len(found["resumed_after"]) == 1
    assert f"requeued job {job} (requeue 1 of 10), resuming after step {found['resumed_after'][0]}" in logs(project)


def step_of(folder: Path) -> int:
    """How far a run is."""
    with suppress(OSError, ValueError):
        return int(json.loads((folder / "status.json").read_text(encoding="utf-8"))["step"])
    return 0


def test_array(project: Path, slurm: Cluster, caches: dict[str, str]) -> None:
    """A task a recipe."""
    words = [*SMALL, "--array=0-1", "launch/slurm/array.sbatch", "first.yaml", "second.yaml"]
    said = handed_in(project, slurm, caches, *words)
    for name in ("first", "second"):
        assert_ended_well(project, name, said)


@pytest.mark.parametrize(("script", "gpus"), [("multi_gpu", 2), ("multi_node", 1)])
def test_several_processes(script: str, gpus: int, project: Path, slurm: Cluster, caches: dict[str, str]) -> None:
    """Two processes, on one node and on two, through ZeRO-2."""
    environment = caches | {"PEFTBENCH_ENGINE": "zero2_cpu.yaml"}
    words = [*SMALL, f"--gpus-per-node={gpus}", f"launch/slurm/{script}.sbatch", "first.yaml"]
    found = assert_ended_well(project, "first", handed_in(project, slurm, environment, *words))
    assert (found["engine"]["name"], found["device"]["num_processes"]) == ("zero2", 2)


def test_submitted_to_two_nodes(project: Path, slurm: Cluster, caches: dict[str, str]) -> None:
    """By one command; stopped by its script in the middle, it begins anew on both and is what one node makes of it."""
    environment = caches | slurm.environment
    words = ["first.yaml", "--engine", "zero2_cpu.yaml", "train.steps=300"]
    one = peftbench(project, environment, "submit", *words, "--gpus-per-node", "0", "--out", "one")
    assert one.returncode == 0, one.stderr
    slurm.await_empty(300)
    two = peftbench(
        project,
        environment,
        "submit",
        *words,
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
    wait_until(lambda: step_of(project / "two" / "first") > 2, 120, slurm.logs)
    (row,) = standing(project, "two", environment)
    assert (row["state"], row["total_steps"]) == ("running", 300)
    assert "NumNodes=2 NumCPUs=4" in slurm.run("scontrol", "show", "job", job)
    assert "CPUs=4" in slurm.run("scontrol", "show", "step", f"{job}.0")
    slurm.send("scancel", "--batch", "--signal=USR1", job)
    slurm.await_empty(300)
    said = "".join(path.read_text(encoding="utf-8") for path in (project / "two").rglob("*.log"))
    ours, theirs = record(project / "one", "first"), record(project / "two", "first")
    assert theirs["outcome"]["kind"] == "ok", said
    assert len(theirs["resumed_after"]) == 1, said
    assert theirs["step_losses"] == pytest.approx(ours["step_losses"], rel=1e-6)
