"""Thirty random interruptions of a suite of eight runs. Each run ends once, with the same result as undisturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.project import RECIPE, ROWS
from tests.slurm.cluster import Cluster
from tests.slurm.suites import assert_equal_results, peftbench, record

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(2400)]
SEED = int(os.environ.get("PEFTBENCH_INTERRUPTIONS", "20"))
"""Seed of the interruptions; another seed gives other moments and runs."""
METHODS = ("lora", "full", "prompt_tuning", "last_layer")
STEPS, INTERRUPTIONS, SECONDS = 260, 30, 1500


def by_kill(_: Cluster, run: Run) -> None:
    """Kill the process, as the kernel does when memory runs out, or as a power failure does."""
    with suppress(ProcessLookupError):
        os.kill(run.status["pid"], signal.SIGKILL)


def by_term(slurm: Cluster, run: Run) -> None:
    """Send SIGTERM to the job, as scancel and preemption do."""
    slurm.send("scancel", "--signal=TERM", run.status["job_id"])


def by_usr1(slurm: Cluster, run: Run) -> None:
    """Send SIGUSR1 to the batch script, as SLURM does before the time limit."""
    slurm.send("scancel", "--batch", "--signal=USR1", run.status["job_id"])


def by_requeue(slurm: Cluster, run: Run) -> None:
    """Requeue the job, as an administrator does."""
    slurm.send("scontrol", "requeue", run.status["job_id"])


WAYS: dict[str, Callable[[Cluster, Run], None]] = {
    "kill": by_kill,
    "TERM": by_term,
    "USR1": by_usr1,
    "requeue": by_requeue,
}


@dataclass
class Run:
    """A run of the suite, as its files describe it."""

    folder: Path
    num_interruptions: int = 0

    @property
    def status(self) -> dict[str, Any]:
        """Return its last status, empty if there is none."""
        with suppress(OSError, ValueError):
            values: dict[str, Any] = json.loads((self.folder / "status.json").read_text(encoding="utf-8"))
            return values
        return {}

    @property
    def is_ok(self) -> bool:
        """True if its record has the outcome ok."""
        with suppress(OSError, ValueError):
            return bool(record(self.folder.parent, self.folder.name)["outcome"]["kind"] == "ok")
        return False

    def can_be_interrupted(self, way: str, *, anywhere: bool) -> bool:
        """True if its process is in a phase that ``way`` may interrupt: training; with ``anywhere`` also other phases.

        A kill during evaluation is excluded, so that no process is killed between its record and its last output line.
        """
        phases = {"warmup", "train"}
        if anywhere:
            phases |= {"load", "build", *(() if way == "kill" else ("evaluate",))}
        status = self.status
        return status.get("phase") in phases and Path(f"/proc/{status['pid']}").exists() and not self.is_ok

    def interrupt(self, way: str, slurm: Cluster) -> bool:
        """Interrupt the run. Return True if its process has ended without a result."""
        pid = self.status["pid"]
        WAYS[way](slurm, self)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        was_interrupted = not Path(f"/proc/{pid}").exists() and not self.is_ok
        self.num_interruptions += was_interrupted
        return was_interrupted


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a folder with a suite of eight runs: four methods with two seeds each, dropout and checkpoints."""
    recipe = RECIPE | {
        "output_dir": "local",
        "checkpoint": {"interval": 20},
        # submit cannot resolve auto, and would submit finished runs again.
        "model": {"path": "shipped", "dropout": 0.1, "attention": "sdpa"},
    }
    names = []
    for method in METHODS:
        for seed in (1, 2):
            name = f"{method}_{seed}"
            train = {"steps": STEPS, "global_batch_size": 4, "seed": seed, "precision": "fp32"}
            values = recipe | {"name": name, "train": train, "method": {"kind": method}}
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
            names.append(f"{name}.yaml")
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"name": "eight", "recipes": names}), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return tmp_path


def interrupt_all(runs: list[Run], slurm: Cluster, submit: Callable[[], str]) -> list[tuple[str, str, str, int]]:
    """Interrupt random runs, and submit them again, until all have ended as ok.

    Return run, kind of interruption, phase and step of each interruption.
    """
    generator = random.Random(SEED)  # noqa: S311 - not used for cryptography
    ways = [way for way in WAYS for _ in range(INTERRUPTIONS // len(WAYS) + 1)]
    generator.shuffle(ways)
    interruptions: list[tuple[str, str, str, int]] = []
    deadline = time.monotonic() + SECONDS
    while not all(run.is_ok for run in runs):
        assert time.monotonic() < deadline, f"{interruptions}\n{slurm.queue()}\n{slurm.logs()}"
        if not slurm.queue():
            submit()
        time.sleep(generator.uniform(0.2, 3.0))
        way, anywhere = ways[len(interruptions)], len(interruptions) % 3 == 0
        candidates = [run for run in runs if run.can_be_interrupted(way, anywhere=anywhere)]
        if not candidates or len(interruptions) == INTERRUPTIONS:
            continue
        run = min(candidates, key=lambda candidate: (candidate.num_interruptions, generator.random()))
        phase, step = run.status["phase"], run.status["step"]
        if run.interrupt(way, slurm):
            interruptions.append((run.folder.name, way, phase, step))
    return interruptions


def test_interrupted_runs_match_undisturbed_runs(project: Path, slurm: Cluster, caches: dict[str, str]) -> None:
    """Every loss is bit-identical, and every run has ended as ok exactly once."""
    environment = caches | slurm.environment | {"OMP_NUM_THREADS": "1"}
    undisturbed = peftbench(project, environment, "run", "suite.yaml")
    assert undisturbed.returncode == 0, undisturbed.stderr

    def submit() -> str:
        arguments = ["submit", "suite.yaml", "--out", "cluster", "--gpus-per-node", "0", "--max-parallel", "2"]
        submitted = peftbench(project, environment, *arguments)
        assert submitted.returncode == 0, submitted.stderr
        return submitted.stdout

    cluster = project / "cluster"
    names = [path.stem for path in sorted(project.glob("*_[12].yaml"))]
    assert len(names) == 8
    interruptions = interrupt_all([Run(cluster / name) for name in names], slurm, submit)
    slurm.await_empty(120)
    print(*interruptions, sep="\n")  # noqa: T201 - pytest shows it if the test fails
    assert len(interruptions) == INTERRUPTIONS, interruptions
    assert set(Counter(way for _, way, *_ in interruptions)) == set(WAYS)
    for name in names:
        assert_equal_results(record(cluster, name), record(project / "local", name))
    logs = "".join(path.read_text(encoding="utf-8") for path in (cluster / "slurm").glob("*.log"))
    assert "Traceback" not in logs
    num_ok = Counter(line["name"] for line in parse_outcome_lines(logs) if line["outcome"] == "ok")
    assert num_ok == dict.fromkeys(names, 1)
    assert sum(len(record(cluster, name)["resumed_after"]) for name in names) >= len(names)


def parse_outcome_lines(logs: str) -> list[dict[str, str]]:
    """Return the JSON line that each process printed at its end."""
    outcomes = []
    for line in logs.splitlines():
        with suppress(ValueError):
            outcome = json.loads(line)
            if isinstance(outcome, dict) and "name" in outcome:
                outcomes.append(outcome)
    return outcomes
