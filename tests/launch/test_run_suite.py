"""``peftbench run`` and ``accelerate launch`` as whole processes, some interrupted."""

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
from typer.testing import CliRunner

from peftbench.cli.app import app
from tests.helpers.paths import REPOSITORY

CONFIG = REPOSITORY / "accel_configs" / "cpu2.yaml"
SUITE = "name: s\nrecipes: [recipe.yaml]\naxes: {method.r: [1, 2]}\n"


def peftbench(*arguments: str) -> list[str]:
    """Return a command that runs ``peftbench`` with this interpreter."""
    return [sys.executable, "-c", "from peftbench.cli.app import main; main()", *arguments]


def run(command: list[str], folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command in ``folder`` and return the completed process."""
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def record_of(folder: Path, name: str) -> dict[str, Any]:
    """Return the record of a run."""
    values: dict[str, Any] = json.loads((folder / "out" / name / "record.json").read_text(encoding="utf-8"))
    return values


@pytest.mark.parametrize(
    ("key", "values"),
    [("method.kind", ["lora", "lead"]), pytest.param("method.r", [1, 2], marks=pytest.mark.slow)],
)
def test_suite_skips_finished_runs_and_repeats_changed_ones(
    key: str, values: list[str | int], project: Path, caches: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second start repeats no finished run; a run with a changed recipe is repeated.

    The suite runs in this process, and each of its runs in a new one.
    """
    monkeypatch.chdir(project)
    for name, value in caches.items():
        monkeypatch.setenv(name, value)
    suite: dict[str, Any] = {"name": "s", "recipes": ["recipe.yaml"]}
    names = [f"run-{key.split('.')[1]}={value}" for value in values]
    (project / "suite.yaml").write_text(yaml.safe_dump(suite | {"axes": {key: values}}))
    first = CliRunner().invoke(app, ["run", "suite.yaml"])
    assert first.exit_code == 0, first.stderr
    assert names[0] in first.stdout
    assert first.stdout.splitlines()[-1] == "report: out/report.html"
    started = {name: record_of(project, name)["started_at"] for name in names}
    planned = [name for name in names if record_of(project, name)["plan"] is not None]
    assert planned == [name for name in names if not name.endswith("lead")]  # a baseline trains nothing
    recipe = yaml.safe_load((project / "recipe.yaml").read_text()) | {"evaluate": {"max_new_tokens": 9, "metrics": ()}}
    again = CliRunner().invoke(app, ["run", "suite.yaml"])
    assert again.stderr.count("skipped") == 2
    assert {name: record_of(project, name)["started_at"] for name in started} == started
    (project / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (project / "suite.yaml").write_text(yaml.safe_dump(suite | {"axes": {key: values[1:]}}))
    changed = CliRunner().invoke(app, ["run", "suite.yaml"])
    assert changed.exit_code == 0, changed.stderr
    assert "skipped" not in changed.stderr
    assert record_of(project, names[1])["recipe"]["evaluate"]["max_new_tokens"] == 9
    reported = CliRunner().invoke(app, ["report", "out"])
    assert reported.exit_code == 0, reported.stderr
    assert names[1] in reported.stdout


@pytest.mark.slow
def test_reproduce_commands_repeat_the_run(project: Path, caches: dict[str, str]) -> None:
    """The commands of the report page need only the record, and give the same losses."""
    (project / "suite.yaml").write_text(SUITE.replace("[1, 2]", "[2]"))
    done = run(
        peftbench("run", "suite.yaml", "train.steps=3", "data.padding=longest", "data.pad_to_multiple_of=7"),
        project,
        caches,
    )
    assert done.returncode == 0, done.stderr
    page = (project / "out" / "report.html").read_text(encoding="utf-8")
    (printed,) = re.findall(r"<code>([^<]*launch/train.py[^<]*)</code>", page)
    (project / "recipe.yaml").unlink()
    # The folder is not a git checkout, so the commands that restore the run's commit are left out.
    lines = [line for line in html.unescape(printed).splitlines() if not re.match("git checkout|pip install", line)]
    assert len(lines) == 2
    for line in lines:
        command = line.replace("launch/", f"{shlex.quote(str(REPOSITORY))}/launch/")
        again = run(["bash", "-c", f'python() {{ {shlex.quote(sys.executable)} "$@"; }}; {command}'], project, caches)
        assert again.returncode == 0, again.stderr
    assert (project.parent / "run-r=2.json").is_file()
    repeated = json.loads((project / "out_again" / "run-r=2" / "record.json").read_text(encoding="utf-8"))
    assert repeated["step_losses"] == record_of(project, "run-r=2")["step_losses"]
    assert len(repeated["step_losses"]) == 3
    assert sum(repeated["step_tokens"]) == repeated["tokens"]["real"] < repeated["tokens"]["padded"]


@pytest.mark.slow
def test_interrupted_suite_resumes(project: Path, caches: dict[str, str]) -> None:
    """Ctrl-C in the second run keeps the first, records the step, ends all processes, and prints how to resume."""
    (project / "suite.yaml").write_text("name: s\nrecipes: [recipe.yaml]\naxes: {train.steps: [2, 100000]}\n")
    command = peftbench("run", "suite.yaml", "trackers=[tensorboard]")
    process = subprocess.Popen(
        command,
        cwd=project,
        env=caches,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # If a shell started these tests in the background, child processes ignore SIGINT unless it is reset.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    second = project / "out" / "run-steps=100000"
    deadline = time.monotonic() + 200
    while (
        not list(second.rglob("events.out.*")) and time.monotonic() < deadline
    ):  # the tracker creates it when training starts
        time.sleep(0.2)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "run the same command again to resume" in stderr
    assert "Traceback" not in stderr
    assert subprocess.run(["pgrep", "-f", str(project)], capture_output=True, check=False).returncode == 1
    assert record_of(project, "run-steps=2")["outcome"]["kind"] == "ok"
    interrupted = record_of(project, "run-steps=100000")
    assert interrupted["outcome"]["kind"] == "preempted"
    assert interrupted["outcome"]["phase"] in {
        "warmup",
        "train",
    }  # on a busy machine, two seconds may not be enough to leave warmup
    step = interrupted["outcome"]["step"]
    assert interrupted["outcome"]["error"] == f"stopped by SIGINT; checkpoint of step {step}"
    assert len(interrupted["step_losses"]) == step
    (project / "suite.yaml").write_text("name: s\nrecipes: [recipe.yaml]\naxes: {train.steps: [2]}\n")
    finished = run(command, project, caches)
    assert finished.returncode == 0, finished.stderr
    assert "[1/1] run-steps=2: finished before, skipped" in finished.stderr


@pytest.mark.slow
def test_suite_ignores_record_of_another_recipe(project: Path, caches: dict[str, str]) -> None:
    """A refused run has no row, even if a record of an earlier recipe with the same name exists."""
    (project / "suite.yaml").write_text("name: mine\nrecipes: [recipe.yaml]\n")
    first = run(peftbench("run", "suite.yaml", "method.kind=lead"), project, caches)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[0].strip() == "mine"
    assert "lead" in first.stdout
    second = run(peftbench("run", "suite.yaml", "method.kind=lead", "evaluate.split=validation"), project, caches)
    assert second.returncode == 1
    assert "run: refused" in second.stderr
    assert "lead" not in second.stdout


@pytest.mark.slow
def test_refused_run_keeps_its_reason(project: Path, caches: dict[str, str]) -> None:
    """After the suite has ended, status, report and page have the state and the sentence; a later start replaces it."""
    (project / "suite.yaml").write_text("name: mine\nrecipes: [recipe.yaml]\n")
    first = run(peftbench("run", "suite.yaml", "model.path=./no/such/base"), project, caches)
    assert first.returncode == 1
    sentence = "folder './no/such/base' does not exist"
    assert f"run: refused: {sentence}" in first.stderr
    assert (project / "out" / "report.html").exists()
    (row,) = json.loads(run(peftbench("status", "out", "--json"), project, caches).stdout)
    assert (row["state"], row["detail"].partition(";")[0]) == ("refused", sentence)
    report = run(peftbench("report", "out"), project, caches)
    assert f"unfinished: run (refused): {sentence}" in report.stdout
    assert sentence in html.unescape((project / "out" / "report.html").read_text(encoding="utf-8"))
    second = run(peftbench("run", "suite.yaml"), project, caches)
    assert second.returncode == 0, second.stderr
    assert "finished" in run(peftbench("status", "out"), project, caches).stdout
    assert not (project / "out" / "run" / "refusal.json").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_bad_data_ends_all_processes_with_one_error(project: Path, caches: dict[str, str]) -> None:
    """The error of the main process ends all ranks; no rank blocks or prints a traceback."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    script = str(REPOSITORY / "launch" / "train.py")
    done = run(
        [*launcher, "--main_process_port", "0", script, "--config", "recipe.yaml", "data.source.test=nothing.jsonl"],
        project,
        caches,
    )
    assert json.loads(done.stdout.strip().splitlines()[-1])["exit_code"] == 21
    before_launcher = done.stderr.split("torch/distributed/elastic")[0]
    assert before_launcher.count("error: ") == 1
    assert "Traceback" not in before_launcher


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_match_one(project: Path, caches: dict[str, str]) -> None:
    """Losses agree to 1e-4, the evaluation is the same, and each example counts once."""
    changes = ["train.steps=4", "train.micro_batch_size=1", "evaluate.metrics=null", "evaluate.batch_size=3"]
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
    assert double["device"]["num_processes"] == 2
    assert (single["engine"]["gradient_accumulation_steps"], double["engine"]["gradient_accumulation_steps"]) == (4, 2)
    assert len(single["step_losses"]) == 4
    assert single["step_losses"] == pytest.approx(double["step_losses"], abs=1e-4)
    assert single["tokens"] == double["tokens"]
    assert single["quality"]["loss"] == pytest.approx(double["quality"]["loss"], abs=1e-4)
    assert single["quality"]["metrics"] == double["quality"]["metrics"]
    assert single["quality"]["samples"] == double["quality"]["samples"]
    one, two = single["quality"]["per_example"], double["quality"]["per_example"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
    assert one | {"loss": None} == two | {"loss": None}
    assert single["flops"]["model_flops"] == double["flops"]["model_flops"] > 0
    by_rank = [rank["evaluate"]["rss_bytes"] for rank in double["memory_by_rank"]]
    assert len(by_rank) == 2
    assert double["memory"]["evaluate"]["rss_bytes"] == max(by_rank) > 0


@pytest.mark.slow
@pytest.mark.multiprocess
def test_plan_of_two_processes_equals_the_measured_bytes(project: Path, caches: dict[str, str]) -> None:
    """The main process of a distributed run has the plan of its own share, made in another process."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    keys = ["train.precision=fp32", "train.steps=3", "profile.untimed_steps=2", "profile.memory_breakdown=true"]
    script = str(REPOSITORY / "launch" / "train.py")
    done = run([*launcher, "--main_process_port", "0", script, "--config", "recipe.yaml", *keys], project, caches)
    assert done.returncode == 0, done.stderr
    record = record_of(project, "run")
    planned = record["plan"]["predicted"]
    assert planned is not None, record["plan"]["reason"]
    assert planned["step"] == record["memory_breakdown"]["step"]
    assert planned["live_bytes"] == pytest.approx(record["memory_breakdown"]["peak_bytes"], rel=0.05)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_indivisible_global_batch_is_refused(project: Path, caches: dict[str, str]) -> None:
    """Three examples per step cannot be divided by two processes."""
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
    assert "is not divisible by 2 processes" in last["error"]
    assert not (project / "out" / "run" / "record.json").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_single_process_instead_of_several_is_refused(project: Path, caches: dict[str, str]) -> None:
    """Accelerate starts one process for MULTI_CPU without mpirun; the run refuses that."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8")) | {"distributed_type": "MULTI_CPU", "gpu_ids": "all"}
    (project / "mpi.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", "mpi.yaml"]
    done = run([*launcher, str(REPOSITORY / "launch" / "train.py"), "--config", "recipe.yaml"], project, caches)
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert (last["outcome"], last["exit_code"]) == ("refused", 40)
    assert "requests several processes and the launcher started one" in last["error"]
    assert not (project / "out").exists()
