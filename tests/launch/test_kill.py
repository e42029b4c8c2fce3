"""SIGKILL at random moments: in a step, during a checkpoint, between two runs. No saved step is lost."""

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


def newest(folder: Path) -> list[str]:
    """What lies in the folders of checkpoints now, finished or not."""
    return sorted(path.name for path in folder.glob("out/*/checkpoints/*/*"))


def kept(folder: Path) -> dict[str, int]:
    """The newest finished step of each run; one more than there are where its record is written."""
    found = {path.parents[2].name: 0 for path in folder.glob("out/*/checkpoints/*/*")}
    for path in folder.glob("out/*/checkpoints/*/step-*[0-9]/checkpoint.json"):
        name, step = path.parents[3].name, int(path.parent.name.removeprefix("step-"))
        found[name] = max(found.get(name, 0), step)
    return found | {path.parent.name: STEPS + 1 for path in folder.glob("out/*/record.json")}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills(project: Path, caches: dict[str, str]) -> None:
    """Each launch resumes, and the final losses are bit-identical to an undisturbed suite."""
    seed = random.randrange(2**32)  # noqa: S311
    print("seed of the moments:", seed)  # noqa: T201
    moments = random.Random(seed)  # noqa: S311
    (project / "suite.yaml").write_text(SUITE, encoding="utf-8")
    undisturbed = run(peftbench("run", "suite.yaml"), project, caches)
    assert undisturbed.returncode == 0, undisturbed.stderr
    names = ("run-seed=0", "run-seed=1")
    expected = {name: record_of(project, name) for name in names}
    (project / "out").rename(project / "undisturbed")
    unfinished, before_it = 0, dict[str, int]()
    for kill in range(KILLS):
        process = subprocess.Popen(
            peftbench("run", "suite.yaml"),
            cwd=project,
            env=caches,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before = newest(project)
        if kill % 4:  # the others while it starts: between two runs, or before one has begun
            while newest(project) == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.3))
        else:
            time.sleep(moments.uniform(0, 5))
        assert process.poll() is None, "the suite has ended: there are too few steps for so many kills"
        suite = psutil.Process(process.pid)
        for one in (*suite.children(recursive=True), suite):  # a run is in a session of its own
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        unfinished += any(name.endswith(".unfinished") for name in newest(project))
        held = kept(project)
        assert all(held[name] >= step for name, step in before_it.items()), (before_it, held)
        before_it = held
    print("kills that came while a checkpoint was written:", unfinished)  # noqa: T201
    assert 0 < unfinished < KILLS
    ended = run(peftbench("run", "suite.yaml"), project, caches)
    assert ended.returncode == 0, ended.stderr
    for name in names:
        record = record_of(project, name)
        assert record["outcome"]["kind"] == "ok"
        assert record["step_losses"] == expected[name]["step_losses"]
        assert record["quality"] == expected[name]["quality"]
        assert not (project / "out" / name / "checkpoints").exists()
    # Each went on from a later step than the launch before it, and from the step that the last kill had left.
    for name in names:
        after = record_of(project, name)["resumed_after"]
        assert after == sorted(after)
        assert before_it.get(name, STEPS + 1) in {STEPS + 1, after[-1] if after else 0}
    assert sum(len(record_of(project, name)["resumed_after"]) for name in names) > KILLS // 4
