"""Stop requests to whole processes: a checkpoint is saved, and the resumed run is bit-identical."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from peftbench.errors import DiskFullError
from tests.helpers.disks import mount_tmpfs
from tests.helpers.project import LAUNCH, write_project
from tests.launch.test_run_suite import CONFIG, peftbench, record_of, run

pytestmark = pytest.mark.xdist_group("hosts")
STEPS = 40
ARGUMENTS = ["--config", "recipe.yaml", f"train.steps={STEPS}", "model.dropout=0.1", "profile.untimed_steps=2"]
ONE_PROCESS = [sys.executable, str(LAUNCH)]
TWO_PROCESSES = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    str(CONFIG),
    "--main_process_port",
    "0",
    str(LAUNCH),
]


def start_run(command: list[str], project: Path, caches: dict[str, str], *overrides: str) -> subprocess.Popen[str]:
    """Start a run and return its process."""
    return subprocess.Popen(
        [*command, *ARGUMENTS, *overrides],
        cwd=project,
        env=caches,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=restore_hangup,  # noqa: PLW1509 — no thread of this process holds a lock
    )


def restore_hangup() -> None:
    """Undo an ignored SIGHUP, which a new process inherits: tests may run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def wait_for_training(project: Path, process: subprocess.Popen[str], previous_pid: int | None = None) -> dict[str, Any]:
    """Wait until a run trains and return its status; a status of ``previous_pid`` is ignored."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        try:
            status: dict[str, Any] = json.loads((project / "out" / "run" / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            status = {"phase": ""}
        if status["phase"] in {"warmup", "train"} and status["pid"] != previous_pid:
            return status
        time.sleep(0.05)
    raise AssertionError("the run did not start to train")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, caches: dict[str, str]) -> dict[str, Any]:
    """Return the record of an uninterrupted run."""
    return run_to_end(ONE_PROCESS, tmp_path_factory.mktemp("undisturbed"), caches)


@pytest.fixture(scope="module")
def undisturbed_two(tmp_path_factory: pytest.TempPathFactory, caches: dict[str, str]) -> dict[str, Any]:
    """Return the record of an uninterrupted run of two processes."""
    return run_to_end(TWO_PROCESSES, tmp_path_factory.mktemp("undisturbed"), caches)


def run_to_end(command: list[str], folder: Path, caches: dict[str, str]) -> dict[str, Any]:
    """Run the recipe in an empty folder and return the record."""
    done = run([*command, *ARGUMENTS], write_project(folder), caches)
    assert done.returncode == 0, done.stderr
    return record_of(folder, "run")


def signal_sender(number: signal.Signals) -> Callable[[Path, subprocess.Popen[str]], None]:
    """Return a function that sends a signal to the process."""
    return lambda _, process: process.send_signal(number)


def create_stop_file(project: Path, _process: subprocess.Popen[str]) -> None:
    """Create the stop file, as the batch script of a job does."""
    (project / "out" / "run" / ".stop").touch()


SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
STOP_REQUESTS = {name: signal_sender(signal.Signals[name]) for name in SIGNALS} | {"file": create_stop_file}


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow) for way in STOP_REQUESTS])
def test_stop_saves_a_step_and_resumes(
    way: str, project: Path, caches: dict[str, str], undisturbed: dict[str, Any]
) -> None:
    """Even without a checkpoint interval, the record has the outcome preempted and the saved step."""
    process = start_run(ONE_PROCESS, project, caches)
    wait_for_training(project, process)
    time.sleep(0.5)
    STOP_REQUESTS[way](project, process)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 72, errors
    last = json.loads(output.strip().splitlines()[-1])
    stopped = record_of(project, "run")
    step = stopped["outcome"]["step"]
    assert stopped["outcome"]["kind"] == last["outcome"] == "preempted"
    assert 0 < step == len(stopped["step_losses"]) < STEPS
    reason = ".stop" if way == "file" else way
    assert stopped["outcome"]["error"] == f"stopped by {reason}; checkpoint of step {step}"
    assert stopped["step_losses"] == undisturbed["step_losses"][:step]
    assert not (project / "out" / "run" / ".stop").exists()
    resumed = run([*ONE_PROCESS, *ARGUMENTS], project, caches)
    assert resumed.returncode == 0, resumed.stderr
    record = record_of(project, "run")
    assert record["resumed_after"] == [step]
    assert record["step_losses"] == undisturbed["step_losses"]
    assert record["quality"] == undisturbed["quality"]
    assert record["tokens"] == undisturbed["tokens"]
    assert record["throughput"]["steps"] == STEPS - min(step, 2) - 2  # both processes have untimed steps
    assert not (project / "out" / "run" / "checkpoints").exists()


LONG_EVALUATION = [
    "evaluate.metrics=null",
    "evaluate.max_new_tokens=100",
    "evaluate.batch_size=1",
    "model.dropout=0.0",
]


def wait_for_generation(project: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a run generates."""
    deadline = time.monotonic() + 200
    status = project / "out" / "run" / "status.json"
    while time.monotonic() < deadline and not (status.exists() and '"generate"' in status.read_text(encoding="utf-8")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
def test_stop_during_evaluation(project: Path, caches: dict[str, str]) -> None:
    """The trained model is saved, only the evaluation is repeated, and repeated signals have no further effect."""
    overrides = LONG_EVALUATION
    process = start_run(ONE_PROCESS, project, caches, *overrides)
    wait_for_generation(project, process)
    for _ in range(20):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 72, errors
    stopped = record_of(project, "run")
    assert (stopped["outcome"]["phase"], stopped["outcome"]["step"]) == ("generate", STEPS)
    resumed = run([*ONE_PROCESS, *ARGUMENTS, *overrides], project, caches)
    assert resumed.returncode == 0, resumed.stderr
    record = record_of(project, "run")
    assert record["step_seconds"] == stopped["step_seconds"]
    assert record["step_losses"] == stopped["step_losses"]
    assert record["quality"]["metrics"]


@pytest.mark.slow
def test_second_process_is_refused(project: Path, caches: dict[str, str]) -> None:
    """The second process ends with one error, the first run continues, and SIGKILL releases the folder."""
    process = start_run(ONE_PROCESS, project, caches, "train.steps=100000")
    status = wait_for_training(project, process)
    second = run([*ONE_PROCESS, *ARGUMENTS], project, caches)
    assert second.returncode == 52, second.stderr
    assert f"out/run is in use by process {status['pid']} on " in second.stderr
    assert "Traceback" not in second.stderr
    (project / "suite.yaml").write_text("name: s\nrecipes: [recipe.yaml]\n", encoding="utf-8")
    suite = run(peftbench("run", "suite.yaml", f"train.steps={STEPS}"), project, caches)
    assert suite.returncode == 1
    assert "run: refused: out/run is in use by process" in suite.stderr
    process.kill()
    process.communicate()
    status_table = run(peftbench("status", "out"), project, caches)
    assert "gone" in status_table.stdout
    third = start_run(ONE_PROCESS, project, caches, "train.steps=100000")
    assert wait_for_training(project, third, previous_pid=status["pid"])["pid"] == third.pid
    third.kill()
    third.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("free_bytes", [0, 65536], ids=["no room", "room for a record"])
def test_full_disk_during_save(
    free_bytes: int, project: Path, caches: dict[str, str], undisturbed: dict[str, Any]
) -> None:
    """The run ends with an error, earlier checkpoints remain, and with free space it resumes from them."""
    with mount_tmpfs(project / "small", "size=12m") as disk:
        overrides = [f"output_dir={disk}", "checkpoint.interval=2", "checkpoint.keep_latest=1"]
        process = start_run(ONE_PROCESS, project, caches, *overrides)
        checkpoints = disk / "run" / "checkpoints"
        deadline = time.monotonic() + 200
        while not list(checkpoints.rglob("step-*[0-9]/checkpoint.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        fill_disk(disk / "filler", free_bytes)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == DiskFullError.exit_code, errors
        assert "the disk is full: " in errors
        assert "Traceback" not in errors
        assert len(list(checkpoints.rglob("step-*[0-9]"))) == 1
        if free_bytes:
            record = json.loads((disk / "run" / "record.json").read_text(encoding="utf-8"))
            assert record["outcome"]["kind"] == "failed"
        (disk / "filler").unlink()
        resumed = run([*ONE_PROCESS, *ARGUMENTS, *overrides], project, caches)
        assert resumed.returncode == 0, resumed.stderr
        record = json.loads((disk / "run" / "record.json").read_text(encoding="utf-8"))
    assert record["resumed_after"]
    assert record["step_losses"] == undisturbed["step_losses"]


def fill_disk(file: Path, free_bytes: int) -> None:
    """Write to ``file`` until the disk is full except for ``free_bytes``."""
    with file.open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(4096))
    with file.open("r+b") as filler:
        filler.truncate(max(0, file.stat().st_size - free_bytes))


@pytest.mark.slow
def test_damaged_checkpoint_is_skipped(project: Path, caches: dict[str, str], undisturbed: dict[str, Any]) -> None:
    """The run resumes from the previous checkpoint, and its record has a note."""
    process = start_run(ONE_PROCESS, project, caches, "checkpoint.interval=2")
    checkpoints = project / "out" / "run" / "checkpoints"
    deadline = time.monotonic() + 200
    while len(list(checkpoints.rglob("step-*[0-9]/checkpoint.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    complete = [path for path in checkpoints.rglob("step-*") if path.name.removeprefix("step-").isdigit()]
    previous, newest = sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))[-2:]
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    resumed = run([*ONE_PROCESS, *ARGUMENTS, "checkpoint.interval=2"], project, caches)
    assert resumed.returncode == 0, resumed.stderr
    record = record_of(project, "run")
    assert record["resumed_after"] == [int(previous.name.removeprefix("step-"))]
    assert any(newest.name in note for note in record["notes"]), record["notes"]
    assert record["step_losses"] == undisturbed["step_losses"]


@pytest.mark.slow
def test_killed_suite_stops_its_run(project: Path, caches: dict[str, str]) -> None:
    """After SIGKILL of the suite process, the current run saves a checkpoint and ends."""
    (project / "suite.yaml").write_text("name: s\nrecipes: [recipe.yaml]\n", encoding="utf-8")
    arguments = ["run", "suite.yaml", "train.steps=100000"]
    suite = subprocess.Popen(
        peftbench(*arguments), cwd=project, env=caches, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    status = wait_for_training(project, suite)  # type: ignore[arg-type]
    suite.kill()
    suite.wait()
    deadline = time.monotonic() + 60
    while psutil.pid_exists(status["pid"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(status["pid"])
    assert record_of(project, "run")["outcome"]["error"].startswith("stopped by SIGTERM; checkpoint of step ")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("way", ["SIGTERM", "file", "one rank"])
def test_two_processes_stop_at_the_same_step(
    way: str, project: Path, caches: dict[str, str], undisturbed_two: dict[str, Any]
) -> None:
    """The request goes to the launcher, to one rank, or to the stop file; both ranks stop after the same step."""
    process = start_run(TWO_PROCESSES, project, caches)
    status = wait_for_training(project, process)
    time.sleep(0.5)
    if way == "one rank":
        (other,) = (c for c in psutil.Process(process.pid).children(recursive=True) if c.pid != status["pid"])
        other.send_signal(signal.SIGUSR1)
    else:
        STOP_REQUESTS[way](project, process)
    _, errors = process.communicate(timeout=90)
    stopped = record_of(project, "run")
    assert stopped["outcome"]["kind"] == "preempted", errors
    step = stopped["outcome"]["step"]
    assert f"checkpoint of step {step}" in stopped["outcome"]["error"]
    assert not (project / "out" / "run" / ".stop").exists()
    resumed = run([*TWO_PROCESSES, *ARGUMENTS], project, caches)
    assert resumed.returncode == 0, resumed.stderr
    record = record_of(project, "run")
    assert record["resumed_after"] == [step]
    assert record["step_losses"] == undisturbed_two["step_losses"]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("way", ["file", "one rank"])
def test_two_processes_stop_during_evaluation(way: str, project: Path, caches: dict[str, str]) -> None:
    """One record exists, the trained model is saved, and only the evaluation is repeated."""
    overrides = [*LONG_EVALUATION, f"checkpoint.interval={STEPS}"]
    process = start_run(TWO_PROCESSES, project, caches, *overrides)
    wait_for_generation(project, process)
    pid = json.loads((project / "out" / "run" / "status.json").read_text(encoding="utf-8"))["pid"]
    if way == "one rank":
        (other,) = (c for c in psutil.Process(process.pid).children(recursive=True) if c.pid != pid)
        other.send_signal(signal.SIGUSR1)
    else:
        STOP_REQUESTS[way](project, process)
    _, errors = process.communicate(timeout=90)
    stopped = record_of(project, "run")
    assert (stopped["outcome"]["kind"], stopped["outcome"]["step"]) == ("preempted", STEPS), errors
    assert not list((project / "out" / "run").glob(".ended-*"))
    resumed = run([*TWO_PROCESSES, *ARGUMENTS, *overrides], project, caches)
    assert resumed.returncode == 0, resumed.stderr
    record = record_of(project, "run")
    assert record["step_seconds"] == stopped["step_seconds"]
    assert record["step_losses"] == stopped["step_losses"]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("phase", ["train", "generate"])
def test_killed_rank_is_named(phase: str, project: Path, caches: dict[str, str]) -> None:
    """A rank that the kernel kills ends the run as failed, and the record keeps the trained steps."""
    overrides = ["train.steps=100000"] if phase == "train" else LONG_EVALUATION
    process = start_run(TWO_PROCESSES, project, caches, *overrides)
    if phase == "train":
        wait_for_training(project, process)
        time.sleep(1.5)
    else:
        wait_for_generation(project, process)
    pid = json.loads((project / "out" / "run" / "status.json").read_text(encoding="utf-8"))["pid"]
    (other,) = (c for c in psutil.Process(process.pid).children(recursive=True) if c.pid != pid)
    other.kill()
    output, errors = process.communicate(timeout=90)
    record = record_of(project, "run")
    assert record["outcome"]["kind"] == json.loads(output.strip().splitlines()[-1])["outcome"] == "failed", errors
    assert record["outcome"]["error"].startswith("process 1 is gone: it was killed")
    assert len(record["step_losses"]) == record["steps"] > 0
    if phase == "generate":
        assert record["quality"]["loss"] is not None
        resumed = run([*TWO_PROCESSES, *ARGUMENTS, *overrides], project, caches)
        assert resumed.returncode == 0, resumed.stderr
        assert record_of(project, "run")["step_seconds"] == record["step_seconds"]


@pytest.mark.slow
def test_closed_terminal_saves_a_step(project: Path, caches: dict[str, str]) -> None:
    """A run on a terminal that is closed, like a lost ssh session, saves a checkpoint and writes its record."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", *ONE_PROCESS, *ARGUMENTS, "train.steps=100000"],
        cwd=project,
        env=caches,
        text=True,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        preexec_fn=restore_hangup,  # noqa: PLW1509
    )
    os.close(terminal)
    reader = threading.Thread(target=drain, args=(controller,), daemon=True)
    reader.start()
    wait_for_training(project, process)
    time.sleep(0.5)
    os.close(controller)
    assert process.wait(timeout=60) == 72
    outcome = record_of(project, "run")["outcome"]
    assert outcome["error"] == f"stopped by SIGHUP; checkpoint of step {outcome['step']}"


def drain(controller: int) -> None:
    """Read what is written to a terminal until it is closed."""
    with suppress(OSError):
        while select.select([controller], [], [], 0.1)[0] == [] or os.read(controller, 65536):
            pass


@pytest.mark.slow
def test_killed_rerun_keeps_the_old_model(project: Path, caches: dict[str, str]) -> None:
    """The old record and model stay and still belong together, so that the old recipe counts as finished."""
    first = run([*ONE_PROCESS, *ARGUMENTS], project, caches)
    assert first.returncode == 0, first.stderr
    record = record_of(project, "run")
    model = {path.name: path.read_bytes() for path in (project / "out" / "run" / "model").iterdir()}
    second = start_run(ONE_PROCESS, project, caches, "train.steps=100000")
    wait_for_training(project, second)
    second.kill()
    second.communicate()
    assert {path.name: path.read_bytes() for path in (project / "out" / "run" / "model").iterdir()} == model
    assert record_of(project, "run") == record
    skipped = run([*ONE_PROCESS, *ARGUMENTS, "--skip-finished"], project, caches)
    assert skipped.returncode == 0, skipped.stderr
    assert "already has a result" in skipped.stderr
    assert record_of(project, "run") == record


@pytest.mark.slow
def test_second_stop_while_loading_keeps_the_record(project: Path, caches: dict[str, str]) -> None:
    """The record of the stopped training stays; a record of 0 steps does not replace it."""
    process = start_run(ONE_PROCESS, project, caches)
    wait_for_training(project, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    stopped = record_of(project, "run")
    assert stopped["steps"] > 0
    status = project / "out" / "run" / "status.json"
    pid = json.loads(status.read_text(encoding="utf-8"))["pid"]
    second = start_run(ONE_PROCESS, project, caches)
    deadline = time.monotonic() + 100
    while json.loads(status.read_text(encoding="utf-8"))["pid"] == pid and time.monotonic() < deadline:
        time.sleep(0.01)
    second.send_signal(signal.SIGTERM)
    output, errors = second.communicate(timeout=60)
    assert second.returncode == 72, errors
    assert json.loads(output.strip().splitlines()[-1])["outcome"] == "preempted"
    assert record_of(project, "run") == stopped


@pytest.mark.slow
@pytest.mark.parametrize("lead", ["0.001", "600"])
def test_lead_shorter_than_a_step_is_refused(lead: str, project: Path, caches: dict[str, str]) -> None:
    """The run fails after the first measured steps if one takes longer than the lead of the stop signal."""
    done = run([*ONE_PROCESS, *ARGUMENTS], project, caches | {"PEFTBENCH_STOP_LEAD": lead})
    if lead == "600":
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 91, done.stderr
    assert "stop signal only 0.001 s before the time limit; send it earlier, e.g. slurm.signal=B:USR1@" in done.stderr
    record = record_of(project, "run")
    assert (record["outcome"]["kind"], len(record["step_losses"])) == ("failed", 3)
