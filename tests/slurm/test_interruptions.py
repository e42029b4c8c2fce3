"""Thirty interruptions of every kind, at random, over a suite of eight runs: each has the same result, once."""

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

from tests.launch.conftest import RECIPE, ROWS
from tests.slurm.cluster import Cluster
from tests.slurm.suites import assert_same, peftbench, record

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(2400)]
SEED = int(os.environ.get("PEFTBENCH_INTERRUPTIONS", "20"))
"""Another one is another test of the same thing."""
METHODS = ("lora", "full", "prompt_tuning", "last_layer")
STEPS, INTERRUPTIONS, SECONDS = 260, 30, 1500


def by_kill(_: Cluster, run: Run) -> None:
    """As a process that the system ends for want of memory, or a node that loses its power."""
    with suppress(ProcessLookupError):
        os.kill(run.status["pid"], signal.SIGKILL)


def by_term(slurm: Cluster, run: Run) -> None:
    """As scancel does, or whoever wants the node for another job."""
    slurm.send("scancel", "--signal=TERM", run.status["job_id"])


def by_usr1(slurm: Cluster, run: Run) -> None:
    """As SLURM tells the script before its time is up."""
    slurm.send("scancel", "--batch", "--signal=USR1", run.status["job_id"])


def by_requeue(slurm: Cluster, run: Run) -> None:
    """As an administrator does."""
    slurm.send("scontrol", "requeue", run.status["job_id"])


WAYS: dict[str, Callable[[Cluster, Run], None]] = {
    "kill": by_kill,
    "TERM": by_term,
    "USR1": by_usr1,
    "requeue": by_requeue,
}


@dataclass
class Run:
    """One of the suite, as its files tell."""

    folder: Path
    interrupted: int = 0

    @property
    def status(self) -> dict[str, Any]:
        """What it last said."""
        with suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.folder / "status.json").read_text(encoding="utf-8"))
            return found
        return {}

    @property
    def ended_well(self) -> bool:
        """Whether it has its result."""
        with suppress(OSError, ValueError):
            return bool(record(self.folder.parent, self.folder.name)["outcome"]["kind"] == "ok")
        return False

    def can_be_interrupted(self, way: str, *, anywhere: bool) -> bool:
        """Whether a process trains it, or loads or evaluates it; one with a result is not killed before it says so."""
        phases = {"warmup", "train"}
        if anywhere:
            phases |= {"load", "build", *(() if way == "kill" else ("evaluate",))}
        status = self.status
        return status.get("phase") in phases and Path(f"/proc/{status['pid']}").exists() and not self.ended_well

    def interrupt(self, way: str, slurm: Cluster) -> bool:
        """Stop it in one of the ways; whether that process is gone, and has no result."""
        pid = self.status["pid"]
        WAYS[way](slurm, self)
        until = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
            time.sleep(0.05)
        gone = not Path(f"/proc/{pid}").exists() and not self.ended_well
        self.interrupted += gone
        return gone


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Eight runs: four methods with two seeds each, with dropout where there is one, and checkpoints now and then."""
    recipe = RECIPE | {
        "output_dir": "local",
        "checkpoint": {"interval": 20},
        "model": {"path": "shipped", "dropout": 0.1},
    }
    names = []
    for method in METHODS:
        for seed in (1, 2):
            name = f"{method}_{seed}"
            train = {"steps": STEPS, "global_batch_size": 4, "seed": seed}
            made = recipe | {"name": name, "train": train, "method": {"kind": method}}
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(made), encoding="utf-8")
            names.append(f"{name}.yaml")
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"name": "eight", "recipes": names}), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return tmp_path


def interrupt_all(runs: list[Run], slurm: Cluster, submit: Callable[[], str]) -> list[tuple[str, str, str, int]]:
    """Submit, interrupt at random, submit what was ended, until all have their result; what was done to which."""
    chance = random.Random(SEED)  # noqa: S311 - nothing to keep secret
    deck = [way for way in WAYS for _ in range(INTERRUPTIONS // len(WAYS) + 1)]
    chance.shuffle(deck)
    done: list[tuple[str, str, str, int]] = []
    until = time.monotonic() + SECONDS
    while not all(run.ended_well for run in runs):
        assert time.monotonic() < until, f"{done}\n{slurm.queue()}\n{slurm.logs()}"
        if not slurm.queue():
            submit()
        time.sleep(chance.uniform(0.2, 3.0))
        way, anywhere = deck[len(done)], len(done) % 3 == 0
        open_to = [run for run in runs if run.can_be_interrupted(way, anywhere=anywhere)]
        if not open_to or len(done) == INTERRUPTIONS:
            continue
        run = min(open_to, key=lambda found: (found.interrupted, chance.random()))
        phase, step = run.status["phase"], run.status["step"]
        if run.interrupt(way, slurm):
            done.append((run.folder.name, way, phase, step))
    return done


def test_thirty_interruptions(project: Path, slurm: Cluster, caches: dict[str, str]) -> None:
    """Every loss is what it would have been, to the last bit, and every run has ended well exactly once."""
    environment = caches | slurm.environment | {"OMP_NUM_THREADS": "1"}
    undisturbed = peftbench(project, environment, "run", "suite.yaml")
    assert undisturbed.returncode == 0, undisturbed.stderr

    def submit() -> str:
        words = ["submit", "suite.yaml", "--out", "cluster", "--gpus-per-node", "0", "--max-parallel", "2"]
        said = peftbench(project, environment, *words)
        assert said.returncode == 0, said.stderr
        return said.stdout

    cluster = project / "cluster"
    names = [path.stem for path in sorted(project.glob("*_[12].yaml"))]
    assert len(names) == 8
    done = interrupt_all([Run(cluster / name) for name in names], slurm, submit)
    slurm.await_empty(120)
    print(*done, sep="\n")  # noqa: T201 - which is shown where it fails
    assert len(done) == INTERRUPTIONS, done
    assert set(Counter(way for _, way, *_ in done)) == set(WAYS)
    for name in names:
        assert_same(record(cluster, name), record(project / "local", name))
    logs = "".join(path.read_text(encoding="utf-8") for path in (cluster / "slurm").glob("*.log"))
    assert "Traceback" not in logs
    ended = Counter(line["name"] for line in last_lines(logs) if line["outcome"] == "ok")
    assert ended == dict.fromkeys(names, 1)
    assert sum(len(record(cluster, name)["resumed_after"]) for name in names) >= len(names)


def last_lines(logs: str) -> list[dict[str, str]]:
    """What each process said at its end."""
    found = []
    for line in logs.splitlines():
        with suppress(ValueError):
            said = json.loads(line)
            if isinstance(said, dict) and "name" in said:
                found.append(said)
    return found
