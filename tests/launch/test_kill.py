"""A suite is killed at random moments: in a step, in a checkpoint, between two runs. No saved step is lost."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.launch.test_run_suite import peftbench, record_of, run

KILLS = 20
STEPS = 150
SUITE = f"""name: s
recipes: [recipe.yaml]
overrides: [checkpoint.interval=1, train.steps={STEPS}, model.dropout=0.1]
axes: {{train.seed: [0, 1]}}
"""


def list_checkpoint_names(folder: Path) -> list[str]:
    """Return the names of all checkpoints, complete or not."""
    return sorted(path.name for path in folder.glob("out/*/checkpoints/*/*"))


def find_latest_steps(folder: Path) -> dict[str, int]:
    """Return the step of each run's newest complete checkpoint, ``STEPS + 1`` if its record exists."""
    steps = {path.parents[2].name: 0 for path in folder.glob("out/*/checkpoints/*/*")}
    for path in folder.glob("out/*/checkpoints/*/step-*[0-9]/checkpoint.json"):
        name, step = path.parents[3].name, int(path.parent.name.removeprefix("step-"))
        steps[name] = max(steps.get(name, 0), step)
    return steps | {path.parent.name: STEPS + 1 for path in folder.glob("out/*/record.json")}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_suite_matches_undisturbed_suite(project: Path, caches: dict[str, str]) -> None:
    """After twenty kills each launch resumes, and the losses are bit-identical to those of an undisturbed suite."""
    seed = random.randrange(2**32)  # noqa: S311
    print("seed of the kill times:", seed)  # noqa: T201
    generator = random.Random(seed)  # noqa: S311
    (project / "suite.yaml").write_text(SUITE, encoding="utf-8")
    undisturbed = run(peftbench("run", "suite.yaml"), project, caches)
    assert undisturbed.returncode == 0, undisturbed.stderr
    names = ("run-seed=0", "run-seed=1")
    expected = {name: record_of(project, name) for name in names}
    (project / "out").rename(project / "undisturbed")
    num_unfinished, previous_steps = 0, dict[str, int]()
    for kill in range(KILLS):
        process = subprocess.Popen(
            peftbench("run", "suite.yaml"),
            cwd=project,
            env=caches,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = list_checkpoint_names(project)
        if kill % 4:  # every fourth kill comes at start-up, between two runs or before the first
            while list_checkpoint_names(project) == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(generator.uniform(0, 0.3))
        else:
            time.sleep(generator.uniform(0, 5))
        assert process.poll() is None, f"the suite ended before {KILLS} kills; raise STEPS"
        suite = psutil.Process(process.pid)
        for member in (*suite.children(recursive=True), suite):  # each run has its own session
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        num_unfinished += any(name.endswith(".unfinished") for name in list_checkpoint_names(project))
        latest_steps = find_latest_steps(project)
        assert all(latest_steps[name] >= step for name, step in previous_steps.items()), (previous_steps, latest_steps)
        previous_steps = latest_steps
    print("kills during a checkpoint:", num_unfinished)  # noqa: T201
    assert 0 < num_unfinished < KILLS
    final = run(peftbench("run", "suite.yaml"), project, caches)
    assert final.returncode == 0, final.stderr
    for name in names:
        record = record_of(project, name)
        assert record["outcome"]["kind"] == "ok"
        assert record["step_losses"] == expected[name]["step_losses"]
        assert record["quality"] == expected[name]["quality"]
        assert not (project / "out" / name / "checkpoints").exists()
    # Each launch resumed from a later step than the previous one, and the last from the newest checkpoint.
    for name in names:
        resumed_after = record_of(project, name)["resumed_after"]
        assert resumed_after == sorted(resumed_after)
        last_step = resumed_after[-1] if resumed_after else 0
        assert previous_steps.get(name, STEPS + 1) in {STEPS + 1, last_step}
    assert sum(len(record_of(project, name)["resumed_after"]) for name in names) > KILLS // 4
