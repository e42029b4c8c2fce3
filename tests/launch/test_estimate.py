"""``peftbench estimate`` and ``peftbench fit``, in subprocesses and in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from peftbench.cli.app import app
from tests.helpers.paths import REPOSITORY
from tests.launch.test_run_suite import peftbench, run


@pytest.fixture
def invoke(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that runs a command of peftbench in this process, in the project's folder."""
    monkeypatch.chdir(project)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_estimate_command_prints_a_table_or_json(
    project: Path, caches: dict[str, str], invoke: Callable[..., Result]
) -> None:
    """The table and the JSON have the plan, and no run folder is created."""
    result = run(peftbench("estimate", "--config", "recipe.yaml", "--device", "t4"), project, caches)
    assert result.returncode == 0, result.stderr
    assert "| backward" in result.stdout
    assert "in 14.56 GiB: fits" in result.stdout
    assert "uncalibrated" in result.stdout
    # The context and workspaces of an unknown GPU do not fit 1 GiB: the command would search for a suggestion.
    plan = json.loads(invoke("estimate", "--config", "recipe.yaml", "--budget", "4GiB", "--json").stdout)
    assert (plan["budget_bytes"], plan["verdict"]) == (4 * 2**30, "fits")
    assert not (project / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--budget", "much"], 80, "'much' is not a memory size; write e.g. 16GiB"),
        (["--device", "t5"], 81, "did you mean 't4'?"),
        (["model.quantization=int8"], 82, "int8"),
        (["--budget", "80GiB", "--device", "t4"], 80, "GiB of Tesla T4; lower it"),
        (["budget.memory=16GiB", "--device", "t4"], 80, "GiB of Tesla T4; lower it"),
        (["--budget", ""], 80, "''"),
        (["train.micro_batch_size=auto"], 80, "--budget"),
        (["--suite", "nothing.yaml"], 14, "file 'nothing.yaml' does not exist"),
        (["--suite", "recipe.yaml"], 10, "recipe.yaml is a recipe, and peftbench estimate --suite takes a suite"),
        (["recipe.yaml", "--suite", "recipe.yaml"], 10, "--suite names the recipes itself; leave recipe.yaml out"),
        (["train.step=3"], 11, "did you mean 'train.steps'?"),
    ],
)
def test_invalid_input_is_refused(arguments: list[str], code: int, message: str, invoke: Callable[..., Result]) -> None:
    """Each error is one sentence with its exit code."""
    result = invoke("estimate", "--config", "recipe.yaml", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("budget", "check_code"),
    [
        ("2GiB", 0),
        ("1MiB", 83),  # below every lower bound: the search for a suggestion simulates nothing
        pytest.param("20MiB", 83, marks=pytest.mark.slow),
    ],
)
def test_check_exits_with_its_code_unless_the_run_fits(
    budget: str, check_code: int, invoke: Callable[..., Result]
) -> None:
    """Without --check the exit code is 0 whatever the verdict; the plan is printed either way."""
    arguments = ["estimate", "recipe.yaml", "--device", "cpu", "--budget", budget]
    plain, checked = invoke(*arguments), invoke(*arguments, "--check")
    assert (plain.exit_code, checked.exit_code) == (0, check_code), checked.output
    verdict = "fits" if check_code == 0 else "does not fit"
    assert f"MiB: {verdict} (" in plain.stdout
    assert plain.stdout == checked.stdout


@pytest.mark.slow
def test_weights_above_the_budget_have_a_plan_and_a_suggestion(invoke: Callable[..., Result]) -> None:
    """Full fine-tuning of Qwen2.5-7B does not fit 16 GiB; --check exits with 83 and one sentence."""
    recipe = str(REPOSITORY / "recipes" / "gpt2_cnn_dm" / "full.yaml")
    result = invoke("estimate", recipe, "model.path=Qwen/Qwen2.5-7B", "--budget", "16GiB", "--check")
    assert result.exit_code == 83, result.output
    assert "in 16.00 GiB: does not fit (" in result.stdout
    assert "suggestion: with method.kind=lora " in result.stdout
    assert result.stderr.count("error: ") == 1


@pytest.mark.slow
def test_fit_prints_each_strategy(project: Path, caches: dict[str, str]) -> None:
    """Each strategy has its largest micro-batch and the overrides to run it; the exit code is 1 if nothing fits."""
    done = run(
        peftbench("fit", "--config", "recipe.yaml", "--budget", "2GiB", "--techniques", "checkpointing,bf16"),
        project,
        caches,
    )
    assert done.returncode == 0, done.stderr
    for strategy in ("unchanged", "checkpointing", "bf16", "checkpointing + bf16"):
        assert f"| {strategy} " in done.stdout
    assert "train.micro_batch_size=4" in done.stdout
    small = run(peftbench("fit", "--config", "recipe.yaml", "--budget", "64MiB"), project, caches)
    assert small.returncode == 1
    assert "64 MiB" in small.stdout
    refused = run(peftbench("fit", "--config", "recipe.yaml"), project, caches)
    assert (refused.returncode, refused.stdout) == (80, "")
    assert "--budget" in refused.stderr


def test_auto_micro_batch_is_resolved(invoke: Callable[..., Result]) -> None:
    """The estimate is for the largest micro-batch that fits the budget."""
    done = invoke("estimate", "--config", "recipe.yaml", "train.micro_batch_size=auto", "--budget", "2GiB", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["micro_batch_size"] == 4


def test_suite_estimate_has_one_entry_per_run(project: Path, invoke: Callable[..., Result]) -> None:
    """The suite's accelerate config is used; a run that cannot be estimated has a reason instead of a plan."""
    (project / "two.yaml").write_text(
        "{distributed_type: MULTI_GPU, num_machines: 1, num_processes: 2, use_cpu: true, gpu_ids: '-1,-1'}",
        encoding="utf-8",
    )
    (project / "suite.yaml").write_text(
        "{name: s, recipes: [recipe.yaml], accelerate: two.yaml, axes: {train.global_batch_size: [4, 3]}}",
        encoding="utf-8",
    )
    done = invoke("estimate", "--suite", "suite.yaml", "--budget", "2GiB", "--json")
    assert done.exit_code == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert (first["name"], first["engine"]) == ("run-global_batch_size=4", "ddp")
    assert (first["num_processes"], first["micro_batch_size"]) == (2, 2)
    assert set(second) == {"name", "reason"}
    assert "3" in second["reason"]


@pytest.mark.slow
def test_fit_omits_techniques_that_the_engine_refuses(project: Path, caches: dict[str, str]) -> None:
    """bf16 weights do not run on ZeRO; the other techniques are listed."""
    arguments = [
        "--techniques",
        "checkpointing,bf16_weights",
        "--accelerate",
        "accel_configs/zero2.yaml",
        "--budget",
        "4GiB",
    ]
    command = peftbench("fit", "--config", str(project / "recipe.yaml"), "method.kind=full", *arguments)
    done = run(command, REPOSITORY, caches)
    assert done.returncode == 0, done.stderr
    assert "| checkpointing " in done.stdout
    assert "bf16_weights" not in done.stdout
