"""Real processes, really told to stop: the step is finished and kept, and what goes on is the same to the last bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from peftbench.errors import DiskFullError
from tests.helpers.disks import mounted
from tests.launch.conftest import LAUNCH, written
from tests.launch.test_run_suite import CONFIG, peftbench, record_of, run

pytestmark = pytest.mark.xdist_group("hosts")
STEPS = 40
ARGUMENTS = ["--config", "recipe.yaml", f"train.steps={STEPS}", "model.dropout=0.1", "profile.untimed_steps=2"]
ALONE = [sys.executable, str(LAUNCH)]
TWO = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    str(CONFIG),
    "--main_process_port",
    "0",
    str(LAUNCH),
]


def begin(command: list[str], project: Path, caches: dict[str, str], *more: str) -> subprocess.Popen[str]:
    """Start a run."""
    return subprocess.Popen(
        [*command, *ARGUMENTS, *more],
        cwd=project,
        env=caches,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def await_training(project: Path, process: subprocess.Popen[str], since: int | None = None) -> dict[str, Any]:
    """Until it trains, after a process that has left its status there; its own."""
    until = time.monotonic() + 200
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()
        try:
            status: dict[str, Any] = json.loads((project / "out" / "run" / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            status = {"phase": ""}
        if status["phase"] in {"warmup", "train"} and status["pid"] != since:
            return status
        time.sleep(0.05)
    raise AssertionError("it did not begin to train")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, caches: dict[str, str]) -> dict[str, Any]:
    """The record of a run that nobody stopped."""
    return by_itself(ALONE, tmp_path_factory.mktemp("undisturbed"), caches)


@pytest.fixture(scope="module")
def undisturbed_two(tmp_path_factory: pytest.TempPathFactory, caches: dict[str, str]) -> dict[str, Any]:
    """The same of two processes."""
    return by_itself(TWO, tmp_path_factory.mktemp("undisturbed"), caches)


def by_itself(command: list[str], folder: Path, caches: dict[str, str]) -> dict[str, Any]:
    """The record of a run to its end, in a folder of its own."""
    done = run([*command, *ARGUMENTS], written(folder), caches)
    assert done.returncode == 0, done.stderr
    return record_of(folder, "run")


def by_signal(number: signal.Signals) -> Callable[[Path, subprocess.Popen[str]], None]:
    """Tell the process itself."""
    return lambda _, process: process.send_signal(number)


def by_file(project: Path, _process: subprocess.Popen[str]) -> None:
    """As a job's script does."""
    (project / "out" / "run" / ".stop").touch()


WAYS = {name: by_signal(signal.Signals[name]) for name in ("SIGINT", "SIGTERM", "SIGUSR1")} | {"file": by_file}


@pytest.mark.parametrize("way", [way if way == "SIGINT" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_a_step_is_kept_and_gone_on_from(
    way: str, project: Path, caches: dict[str, str], undisturbed: dict[str, Any]
) -> None:
    """Without checkpoints having been asked for; the record says preempted, and which step."""
    process = begin(ALONE, project, caches)
    await_training(project, process)
    time.sleep(0.5)
    WAYS[way](project, process)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 72, errors
    last = json.loads(said.strip().splitlines()[-1])
    stopped = record_of(project, "run")
    step = stopped["outcome"]["step"]
    assert stopped["outcome"]["kind"] == last["outcome"] == "preempted"
    assert 0 < step == len(stopped["step_losses"]) < STEPS
    by = ".stop" if way == "file" else way
    assert stopped["outcome"]["error"] == f"stopped by {by}; checkpoint of step {step}"
    assert stopped["step_losses"] == undisturbed["step_losses"][:step]
    assert not (project / "out" / "run" / ".stop").exists()
    ended = run([*ALONE, *ARGUMENTS], project, caches)
    assert ended.returncode == 0, ended.stderr
    record = record_of(project, "run")
    assert record["resumed_after"] == [step]
    assert record["step_losses"] == undisturbed["step_losses"]
    assert record["quality"] == undisturbed["quality"]
    assert record["tokens"] == undisturbed["tokens"]
    assert record["throughput"]["steps"] == STEPS - min(step, 2) - 2  # of both processes
    assert not (project / "out" / "run" / "checkpoints").exists()


LONG_EVALUATION = [
    "evaluate.generate=true",
    "evaluate.max_new_tokens=100",
    "evaluate.batch_size=1",
    "model.dropout=0.0",
]


def await_evaluation(project: Path, process: subprocess.Popen[str]) -> None:
    """Until it generates."""
    until = time.monotonic() + 200
    status = project / "out" / "run" / "status.json"
    while time.monotonic() < until and not (status.exists() and '"generate"' in status.read_text(encoding="utf-8")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
def test_stopped_while_it_evaluates(project: Path, caches: dict[str, str]) -> None:
    """The training is kept, and only the evaluation is done again; told twice, as SLURM and a launcher do together."""
    more = LONG_EVALUATION
    process = begin(ALONE, project, caches, *more)
    await_evaluation(project, process)
    for _ in range(20):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 72, errors
    stopped = record_of(project, "run")
    assert (stopped["outcome"]["phase"], stopped["outcome"]["step"]) == ("generate", STEPS)
    ended = run([*ALONE, *ARGUMENTS, *more], project, caches)
    assert ended.returncode == 0, ended.stderr
    record = record_of(project, "run")
    assert record["resumed_after"] == [STEPS]
    assert record["step_losses"] == stopped["step_losses"]
    assert record["quality"]["rouge"] is not None


def test_a_second_process_is_refused(project: Path, caches: dict[str, str]) -> None:
    """In one sentence, with an exit code of its own, and the first is not disturbed; kill -9 frees the folder."""
    process = begin(ALONE, project, caches, "train.steps=100000")
    status = await_training(project, process)
    second = run([*ALONE, *ARGUMENTS], project, caches)
    assert second.returncode == 52, second.stderr
    assert f"out/run is in use by process {status['pid']} on " in second.stderr
    assert "Traceback" not in second.stderr
    (project / "suite.yaml").write_text("name: s\nrecipes: [recipe.yaml]\n", encoding="utf-8")
    compared = run(peftbench("run", "suite.yaml", f"train.steps={STEPS}"), project, caches)
    assert compared.returncode == 1
    assert "run: refused: out/run is in use by process" in compared.stderr
    process.kill()
    process.communicate()
    told = run(peftbench("status", "out"), project, caches)
    assert "gone" in told.stdout
    third = begin(ALONE, project, caches, "train.steps=100000")
    assert await_training(project, third, since=status["pid"])["pid"] == third.pid
    third.kill()
    third.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 65536], ids=["no room", "room for a record"])
def test_a_full_disk_while_it_saves(
    room: int, project: Path, caches: dict[str, str], undisturbed: dict[str, Any]
) -> None:
    """It ends with a sentence, what was kept before stays, and with room again the run goes on from there."""
    with mounted(project / "small", "size=12m") as disk:
        more = [f"output_dir={disk}", "checkpoint.interval=2", "checkpoint.keep_latest=1"]
        process = begin(ALONE, project, caches, *more)
        kept = disk / "run" / "checkpoints"
        until = time.monotonic() + 200
        while not list(kept.rglob("step-*[0-9]/checkpoint.json")) and time.monotonic() < until:
            time.sleep(0.01)
        fill(disk / "filler", room)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == DiskFullError.exit_code, errors
        assert "the disk is full: " in errors
        assert "Traceback" not in errors
        assert len(list(kept.rglob("step-*[0-9]"))) == 1
        if room:
            record = json.loads((disk / "run" / "record.json").read_text(encoding="utf-8"))
            assert record["outcome"]["kind"] == "failed"
        (disk / "filler").unlink()
        ended = run([*ALONE, *ARGUMENTS, *more], project, caches)
        assert ended.returncode == 0, ended.stderr
        record = json.loads((disk / "run" / "record.json").read_text(encoding="utf-8"))
    assert record["resumed_after"]
    assert record["step_losses"] == undisturbed["step_losses"]


def fill(file: Path, room: int) -> None:
    """Take all that a disk has but so many bytes."""
    with file.open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(4096))
    with file.open("r+b") as filler:
        filler.truncate(max(0, file.stat().st_size - room))


@pytest.mark.slow
def test_a_damaged_checkpoint(project: Path, caches: dict[str, str], undisturbed: dict[str, Any]) -> None:
    """It goes on from the one before, and says so."""
    process = begin(ALONE, project, caches, "checkpoint.interval=2")
    kept = project / "out" / "run" / "checkpoints"
    until = time.monotonic() + 200
    while len(list(kept.rglob("step-*[0-9]/checkpoint.json"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    whole = [path for path in kept.rglob("step-*") if path.name.removeprefix("step-").isdigit()]
    before, newest = sorted(whole, key=lambda path: int(path.name.removeprefix("step-")))[-2:]
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    ended = run([*ALONE, *ARGUMENTS, "checkpoint.interval=2"], project, caches)
    assert ended.returncode == 0, ended.stderr
    record = record_of(project, "run")
    assert record["resumed_after"] == [int(before.name.removeprefix("step-"))]
    assert any(newest.name in note for note in record["notes"]), record["notes"]
    assert record["step_losses"] == undisturbed["step_losses"]


@pytest.mark.slow
def test_a_suite_that_is_killed_takes_its_run_along(project: Path, caches: dict[str, str]) -> None:
    """Kill -9 of compare: the run under way is told, keeps its step and ends, so that the next compare can go on."""
    (project / "suite.yaml").write_text("name: s\nrecipes: [recipe.yaml]\n", encoding="utf-8")
    words = ["run", "suite.yaml", "train.steps=100000"]
    suite = subprocess.Popen(
        peftbench(*words), cwd=project, env=caches, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    status = await_training(project, suite)  # type: ignore[arg-type]
    suite.kill()
    suite.wait()
    until = time.monotonic() + 60
    while psutil.pid_exists(status["pid"]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not psutil.pid_exists(status["pid"])
    assert record_of(project, "run")["outcome"]["error"].startswith("stopped by SIGTERM; checkpoint of step ")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("way", ["SIGTERM", "file", "one rank"])
def test_two_processes_stop_together(
    way: str, project: Path, caches: dict[str, str], undisturbed_two: dict[str, Any]
) -> None:
    """The launcher is told, or a file is there, or one of the ranks is told: both finish the same step."""
    process = begin(TWO, project, caches)
    status = await_training(project, process)
    time.sleep(0.5)
    if way == "one rank":
        (other,) = (c for c in psutil.Process(process.pid).children(recursive=True) if c.pid != status["pid"])
        other.send_signal(signal.SIGUSR1)
    else:
        WAYS[way](project, process)
    _, errors = process.communicate(timeout=90)
    stopped = record_of(project, "run")
    assert stopped["outcome"]["kind"] == "preempted", errors
    step = stopped["outcome"]["step"]
    assert f"checkpoint of step {step}" in stopped["outcome"]["error"]
    assert not (project / "out" / "run" / ".stop").exists()
    ended = run([*TWO, *ARGUMENTS], project, caches)
    assert ended.returncode == 0, ended.stderr
    record = record_of(project, "run")
    assert record["resumed_after"] == [step]
    assert record["step_losses"] == undisturbed_two["step_losses"]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("way", ["file", "one rank"])
def test_two_processes_are_stopped_while_they_evaluate(way: str, project: Path, caches: dict[str, str]) -> None:
    """Whoever hears it first tells the other, which may be waiting for it: one record, and the training is kept."""
    more = [*LONG_EVALUATION, f"checkpoint.interval={STEPS}"]
    process = begin(TWO, project, caches, *more)
    await_evaluation(project, process)
    pid = json.loads((project / "out" / "run" / "status.json").read_text(encoding="utf-8"))["pid"]
    if way == "one rank":
        (other,) = (c for c in psutil.Process(process.pid).children(recursive=True) if c.pid != pid)
        other.send_signal(signal.SIGUSR1)
    else:
        WAYS[way](project, process)
    _, errors = process.communicate(timeout=90)
    stopped = record_of(project, "run")
    assert (stopped["outcome"]["kind"], stopped["outcome"]["step"]) == ("preempted", STEPS), errors
    assert not list((project / "out" / "run").glob(".ended-*"))
    ended = run([*TWO, *ARGUMENTS, *more], project, caches)
    assert ended.returncode == 0, ended.stderr
    record = record_of(project, "run")
    assert record["resumed_after"] == [STEPS]
    assert record["step_losses"] == stopped["step_losses"]


@pytest.mark.slow
@pytest.mark.parametrize("lead", ["0.001", "600"])
def test_a_job_that_is_told_too_late(lead: str, project: Path, caches: dict[str, str]) -> None:
    """Where a step takes longer than there is between being told and the end, it is refused as soon as that shows."""
    done = run([*ALONE, *ARGUMENTS], project, caches | {"PEFTBENCH_STOP_LEAD": lead})
    if lead == "600":
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 91, done.stderr
    assert "stop signal only 0.001 s before the time limit; send it earlier, e.g. slurm.signal=B:USR1@" in done.stderr
    record = record_of(project, "run")
    assert (record["outcome"]["kind"], len(record["step_losses"])) == ("failed", 3)
