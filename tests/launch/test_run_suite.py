"""``peftbench compare`` and ``accelerate launch``, as a user starts them: real processes, really interrupted."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.paths import REPOSITORY

CONFIG = REPOSITORY / "accel_configs" / "cpu2.yaml"
SUITE = "name: s\nrecipes: [recipe.yaml]\naxes: {method.r: [1, 2]}\n"


def peftbench(*arguments: str) -> list[str]:
    """The command line of ``peftbench``, from this environment."""
    return [sys.executable, "-c", "from peftbench.cli.app import main; main()", *arguments]


def run(command: list[str], folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A command run to its end in ``folder``."""
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False)


def record_of(folder: Path, name: str) -> dict[str, Any]:
    """What a run kept."""
    found: dict[str, Any] = json.loads((folder / "out" / name / "record.json").read_text(encoding="utf-8"))
    return found


def test_compare_skips_what_is_finished_and_not_what_changed(project: Path, caches: dict[str, str]) -> None:
    """Started again, a suite repeats no finished run; a changed recipe is another run and is run again."""
    (project / "suite.yaml").write_text(SUITE)
    first = run(peftbench("compare", "suite.yaml"), project, caches)
    assert first.returncode == 0, first.stderr
    assert "run-r=1" in first.stdout
    assert first.stdout.splitlines()[-1] == "report: out/report.html"
    started = {name: record_of(project, name)["started_at"] for name in ("run-r=1", "run-r=2")}
    recipe = yaml.safe_load((project / "recipe.yaml").read_text()) | {
        "evaluate": {"max_new_tokens": 9, "generate": False}
    }
    again = run(peftbench("compare", "suite.yaml"), project, caches)
    assert again.stderr.count("skipped") == 2
    assert {name: record_of(project, name)["started_at"] for name in started} == started
    (project / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (project / "suite.yaml").write_text(SUITE.replace("[1, 2]", "[1]"))
    changed = run(peftbench("compare", "suite.yaml"), project, caches)
    assert changed.returncode == 0, changed.stderr
    assert "skipped" not in changed.stderr
    assert record_of(project, "run-r=1")["recipe"]["evaluate"]["max_new_tokens"] == 9
    reported = run(peftbench("report", "out"), project, caches)
    assert reported.returncode == 0, reported.stderr
    assert "run-r=1" in reported.stdout


def test_a_run_is_repeated_from_its_record(project: Path, caches: dict[str, str]) -> None:
    """The commands that the page gives train the same again, loss by loss, from nothing but the record."""
    (project / "suite.yaml").write_text(SUITE.replace("[1, 2]", "[2]"))
    done = run(
        peftbench("compare", "suite.yaml", "train.steps=3", "data.padding=longest", "data.pad_to_multiple_of=7"),
        project,
        caches,
    )
    assert done.returncode == 0, done.stderr
    page = (project / "out" / "report.html").read_text(encoding="utf-8")
    (printed,) = re.findall(r"<code>([^<]*launch/train.py[^<]*)</code>", page)
    (project / "recipe.yaml").unlink()
    # The folder is no checkout: what would make it that of the run's commit is left out.
    lines = [line for line in html.unescape(printed).splitlines() if not re.match("git checkout|pip install", line)]
    assert len(lines) == 2
    for line in lines:
        here = line.replace("launch/", f"{shlex.quote(str(REPOSITORY))}/launch/")
        again = run(["bash", "-c", f'python() {{ {shlex.quote(sys.executable)} "$@"; }}; {here}'], project, caches)
        assert again.returncode == 0, again.stderr
    assert (project.parent / "run-r=2.json").is_file()
    repeated = json.loads((project / "out_again" / "run-r=2" / "record.json").read_text(encoding="utf-8"))
    assert repeated["losses"] == record_of(project, "run-r=2")["losses"]
    assert len(repeated["losses"]) == 3
    assert sum(repeated["step_tokens"]) == repeated["tokens"]["real"] < repeated["tokens"]["padded"]


def test_interrupted_compare_says_how_to_go_on(project: Path, caches: dict[str, str]) -> None:
    """Ctrl-C in the second run keeps the first, records where the second was, leaves no process and says what to do."""
    (project / "suite.yaml").write_text("name: s\nrecipes: [recipe.yaml]\naxes: {train.steps: [2, 100000]}\n")
    command = peftbench("compare", "suite.yaml", "trackers=[tensorboard]")
    process = subprocess.Popen(
        command,
        cwd=project,
        env=caches,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell has what it starts in the background ignore interrupts, these tests too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    second = project / "out" / "run-steps=100000"
    deadline = time.monotonic() + 200
    while not list(second.rglob("events.out.*")) and time.monotonic() < deadline:  # its training has begun
        time.sleep(0.2)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "run the same command again" in said
    assert "Traceback" not in said
    assert subprocess.run(["pgrep", "-f", str(project)], capture_output=True, check=False).returncode == 1
    assert record_of(project, "run-steps=2")["outcome"]["kind"] == "ok"
    interrupted = record_of(project, "run-steps=100000")
    assert interrupted["outcome"]["kind"] == "preempted"
    assert interrupted["outcome"]["phase"] in {"warmup", "train"}  # a busy machine is not far after two seconds
    step = interrupted["outcome"]["step"]
    assert interrupted["outcome"]["error"] == f"stopped by SIGINT; checkpoint of step {step}"
    assert len(interrupted["losses"]) == step
    (project / "suite.yaml").write_text("name: s\nrecipes: [recipe.yaml]\naxes: {train.steps: [2]}\n")
    finished = run(command, project, caches)
    assert finished.returncode == 0, finished.stderr
    assert "[1/1] run-steps=2: finished before, skipped" in finished.stderr


def test_compare_shows_no_result_of_another_recipe(project: Path, caches: dict[str, str]) -> None:
    """A run that is refused now has no row, though an earlier recipe of its name left a record."""
    (project / "suite.yaml").write_text("name: mine\nrecipes: [recipe.yaml]\n")
    first = run(peftbench("compare", "suite.yaml", "method.kind=lead"), project, caches)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[0].strip() == "mine"
    assert "lead" in first.stdout
    second = run(peftbench("compare", "suite.yaml", "method.kind=lead", "evaluate.split=validation"), project, caches)
    assert second.returncode == 1
    assert "run: refused" in second.stderr
    assert "lead" not in second.stdout


@pytest.mark.multiprocess
def test_bad_data_is_refused_once_by_all_processes(project: Path, caches: dict[str, str]) -> None:
    """What the main process finds wrong ends every process in one sentence; none waits, none has a fault of its own."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    script = str(REPOSITORY / "launch" / "train.py")
    done = run(
        [*launcher, "--main_process_port", "0", script, "--config", "recipe.yaml", "data.source.test=nothing.jsonl"],
        project,
        caches,
    )
    assert json.loads(done.stdout.strip().splitlines()[-1])["exit_code"] == 21
    ours = done.stderr.split("torch/distributed/elastic")[0]
    assert ours.count("error: ") == 1
    assert "Traceback" not in ours


@pytest.mark.multiprocess
def test_two_processes_agree_with_one(project: Path, caches: dict[str, str]) -> None:
    """The same recipe on one and on two processes: same losses to 1e-4, same evaluation, each example counted once."""
    changes = ["train.steps=4", "train.micro_batch_size=1", "evaluate.generate=true", "evaluate.batch_size=3"]
    one = run(
        [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--config", "recipe.yaml", *changes, "name=one"],
        project,
        caches,
    )
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIG),
        "--main_process_port",
        "0",
    ]
    two = run(
        [*launcher, str(REPOSITORY / "launch" / "train.py"), "--config", "recipe.yaml", *changes, "name=two"],
        project,
        caches,
    )
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert json.loads(two.stdout.strip().splitlines()[-1])["outcome"] == "ok"
    single, double = record_of(project, "one"), record_of(project, "two")
    assert double["device"]["processes"] == 2
    assert (single["engine"]["accumulation"], double["engine"]["accumulation"]) == (4, 2)
    assert len(single["losses"]) == 4
    assert single["losses"] == pytest.approx(double["losses"], abs=1e-4)
    assert single["tokens"] == double["tokens"]
    assert single["quality"]["loss"] == pytest.approx(double["quality"]["loss"], abs=1e-4)
    assert single["quality"]["rouge"] == double["quality"]["rouge"]
    assert single["quality"]["samples"] == double["quality"]["samples"]
    one, two = single["quality"]["by_example"], double["quality"]["by_example"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
    assert one | {"loss": None} == two | {"loss": None}
    assert single["flops"]["required"] == double["flops"]["required"] > 0
    by_rank = [rank["evaluate"]["resident_bytes"] for rank in double["memory_by_rank"]]
    assert len(by_rank) == 2
    assert double["memory"]["evaluate"]["resident_bytes"] == max(by_rank) > 0


@pytest.mark.multiprocess
def test_a_global_batch_that_cannot_be_shared_is_refused(project: Path, caches: dict[str, str]) -> None:
    """Three examples a step cannot be shared by two processes: refused in one sentence, and nothing is written."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(CONFIG)]
    script = str(REPOSITORY / "launch" / "train.py")
    done = run(
        [*launcher, "--main_process_port", "0", script, "--config", "recipe.yaml", "train.global_batch_size=3"],
        project,
        caches,
    )
    assert done.returncode != 0
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert (last["outcome"], last["exit_code"]) == ("refused", 13)
    assert "cannot be shared by 2 processes" in last["error"]
    assert not (project / "out" / "run" / "record.json").exists()


@pytest.mark.multiprocess
def test_one_process_where_several_were_asked_for_is_refused(project: Path, caches: dict[str, str]) -> None:
    """Accelerate answers MULTI_CPU without mpirun with one process and no word; that run is refused."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8")) | {"distributed_type": "MULTI_CPU", "gpu_ids": "all"}
    (project / "mpi.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", "mpi.yaml"]
    done = run([*launcher, str(REPOSITORY / "launch" / "train.py"), "--config", "recipe.yaml"], project, caches)
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert (last["outcome"], last["exit_code"]) == ("refused", 40)
    assert "asked for several processes and started one" in last["error"]
    assert not (project / "out").exists()
