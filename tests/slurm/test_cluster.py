"""A suite through a real SLURM: interrupted in every way that there is, and in the end the same as without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.launch.conftest import RECIPE, ROWS
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.suites import assert_same, peftbench, record, standing

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(1500)]
SHORT, LONG = 6, 600
SUITE = {"name": "survivors", "recipes": ["short.yaml", "requeued.yaml", "out_of_time.yaml", "cancelled.yaml"]}
LEAD = 15
"""Seconds before the end of its minute at which a job is told; SLURM may tell it up to 60 sooner."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A suite of four recipes, one of which is done at once and three of which take a while."""
    folder = tmp_path / "a folder with $(spaces)"
    folder.mkdir()
    for path in SUITE["recipes"]:
        recipe = RECIPE | {"name": path.removesuffix(".yaml"), "output_dir": "local"}
        recipe["train"] = {"steps": SHORT if path == "short.yaml" else LONG, "global_batch_size": 4}
        (folder / path).write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (folder / "suite.yaml").write_text(yaml.safe_dump(SUITE), encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return folder


def test_a_suite_comes_through(project: Path, slurm: Cluster, caches: dict[str, str]) -> None:
    """One run is requeued by an administrator, one runs out of time, one is cancelled and submitted again."""
    environment = caches | slurm.environment | {"OMP_NUM_THREADS": "1"}
    undisturbed = peftbench(project, environment, "run", "suite.yaml")
    assert undisturbed.returncode == 0, undisturbed.stderr

    words = [
        "submit",
        "suite.yaml",
        "--out",
        "cluster",
        "--gpus-per-node",
        "0",
        "--max-parallel",
        "2",
        "slurm.time=1",
        f"slurm.signal=B:USR1@{LEAD}",
    ]
    submitted = peftbench(project, environment, *words)
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
    slurm.await_empty(900)

    standings = {row["name"]: row for row in standing(project, "cluster", environment)}
    assert standings["cancelled"]["state"] == "preempted", standings
    assert {standings[name]["state"] for name in ("short", "requeued", "out_of_time")} == {"finished"}, standings
    assert record(runs, "out_of_time")["resumed_after"], "it was never out of time"
    assert record(runs, "requeued")["resumed_after"], "it lost what it had"

    again = peftbench(project, environment, *words)
    assert again.returncode == 0, again.stderr
    assert "1 run," in again.stdout
    slurm.await_empty(600)
    for name in (path.removesuffix(".yaml") for path in SUITE["recipes"]):
        assert_same(record(runs, name), record(project / "local", name))
    nothing = peftbench(project, environment, *words)
    assert nothing.stdout == "nothing left to submit\n", nothing


def test_a_time_in_which_nothing_can_be_done(project: Path, slurm: Cluster, caches: dict[str, str]) -> None:
    """It is not begun anew for ever: the first attempt that came no further is the last, and says why."""
    environment = caches | slurm.environment | {"OMP_NUM_THREADS": "1"}
    words = ["submit", "requeued.yaml", "--out", "short", "--gpus-per-node", "0", "slurm.time=1"]
    refused = peftbench(project, environment, *words)
    assert refused.returncode == 91
    assert "told to stop 120 s before its end" in refused.stderr
    assert not (project / "short").exists()
    submitted = peftbench(project, environment, *words, "slurm.signal=B:USR1@59")
    assert submitted.returncode == 0, submitted.stderr
    wait_until(lambda: "RUNNING" in slurm.queue().values(), 60, slurm.logs)
    # As SLURM would within half a minute, but surely before its training begins.
    slurm.run("scancel", "--batch", "--signal=USR1", submitted.stdout.split()[2].rstrip(":"))
    slurm.await_empty(300)
    said = "".join(path.read_text(encoding="utf-8") for path in (project / "short").rglob("*.log"))
    assert "the job's time limit is too short" in said, said
    assert said.count("the job's time limit is too short") == 1
