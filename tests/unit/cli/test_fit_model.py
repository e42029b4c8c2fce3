"""``peftbench fit MODEL``: the table, the JSON, exit codes, examples, the written suite, and refused input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from peftbench.cli.app import app
from peftbench.memory.model_fit.methods import FIT_METHODS
from peftbench.report.tables.model_fit import TABLE_WIDTH
from peftbench.suite.expand import expand, resolve_accelerate_config
from tests.helpers.models import llama_config

Invoke = Callable[..., Result]
PAIRS = [{"prompt": "Name a color. " * (1 + row), "completion": "Red. " * (2 + row)} for row in range(6)]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Return a function that runs ``peftbench fit`` in a folder with a small model and files of examples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    llama_config(
        max_position_embeddings=256, num_hidden_layers=2, hidden_size=32, intermediate_size=48
    ).save_pretrained("model")
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    Path("other.jsonl").write_text('{"a": "b"}\n', encoding="utf-8")
    Path("notes.txt").write_text("text", encoding="utf-8")
    Path("loose.json").write_text(Path("model/config.json").read_text(encoding="utf-8"), encoding="utf-8")
    Path("recipe.yaml").write_text("name: run\n", encoding="utf-8")
    Path("full").mkdir()
    Path("full/file").touch()
    return lambda *arguments: CliRunner().invoke(app, ["fit", *arguments], prog_name="peftbench")


@pytest.fixture
def select_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that reduces the table to some rows, micro-batches and lengths, to keep tests fast."""
    monkeypatch.setattr("peftbench.memory.model_fit.method_search.MICRO_BATCH_SIZES", (1, 2))
    monkeypatch.setattr("peftbench.memory.model_fit.method_search._list_context_lengths", lambda longest: [longest])

    def select(*names: str) -> None:
        chosen = tuple(method for method in FIT_METHODS if method.name in names)
        monkeypatch.setattr("peftbench.memory.model_fit.method_search.FIT_METHODS", chosen)

    return select


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["somebody/model"], 25, "'somebody/model' was not found in a folder, among the shipped configs or on the Hub"),
        (["no_folder/config.json"], 25, "'no_folder/config.json' was not found"),
        (["--budget", "lots"], 80, "'lots' is not a memory size; write e.g. 16GiB"),
        (["--budget", "0"], 80, "a memory budget must be more than 0, not '0'"),
        (["--budget", "-4GiB"], 80, "'-4GiB' is not a memory size"),
        (["--budget", "80GiB", "--device", "t4"], 80, "GiB of Tesla T4; lower it"),
        (["--device", "t5"], 81, "did you mean 't4'?"),
        (["--gpu", "t5"], 81, "did you mean 't4'?"),
        ([], 80, "No memory budget: pass --budget (e.g. 16GiB) or --device"),
        (["--device", "t4", "--data", "notes.txt"], 20, "--data notes.txt must be a file that ends in .jsonl"),
        (["--device", "t4", "--data", "none.jsonl"], 21, "'none.jsonl' does not exist"),
        (["--device", "t4", "--data", "other.jsonl"], 13, "finds no task for the columns of the train split (a)"),
        (["--device", "t4", "train.stepz=3"], 11, "did you mean 'train.steps'?"),
        (["--device", "t4", "--processes", "2"], 80, "--processes needs a distributed engine"),
        (["--device", "t4", "--techniques", "all"], 13, "--techniques needs a recipe"),
        (["--device", "t4", "--largest-model", "gpt2"], 13, "--largest-model needs a recipe"),
        (["--device", "t4", "--write-suite", "full"], 50, "--write-suite full must be a new or an empty folder"),
        (["loose.json", "--device", "t4", "--write-suite", "new"], 14, "loose.json is a config file"),
        (["recipe.yaml", "--device", "t4", "--data", "pairs.jsonl"], 13, "--data needs a model"),
        (["recipe.yaml", "model", "--device", "t4"], 10, "recipe.yaml is a second argument; omit it"),
    ],
)
def test_invalid_input_is_refused(arguments: list[str], code: int, message: str, invoke: Invoke) -> None:
    """Each error is one sentence with its exit code."""
    has_model = arguments and ("." in arguments[0] or "/" in arguments[0])
    result = invoke(*arguments) if has_model else invoke("model", *arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1
    assert result.stderr.count("\n") == 1


def test_command_without_a_model_and_a_recipe_is_refused(invoke: Invoke) -> None:
    """The sentence gives an example of each."""
    result = invoke("--device", "t4")
    assert (result.exit_code, "no model and no recipe was given; pass e.g." in result.stderr) == (10, True)


def test_answer_has_a_line_per_method(invoke: Invoke, select_rows: Callable[..., None]) -> None:
    """The terminal has verdict, sizes and notes in 100 columns; a row without a plan has its reason."""
    select_rows("full_bf16_weights", "lora")
    result = invoke("model", "--gpu", "t4", "--price", "0.5")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= TABLE_WIDTH
    assert "on t4 with 14.56 GiB: 1 of 2 methods surely fit" in lines[0]
    assert next(line for line in lines if line.startswith(" LoRA")).split()[1] == "fits"
    assert any("T4 does not support train.precision=bf16" in line for line in lines)
    assert any("data sheet" in line for line in lines)


@pytest.mark.parametrize(
    ("budget", "code", "verdict"),
    [pytest.param("4 GB", 0, "fits", marks=pytest.mark.slow), ("4MB", 1, "does not fit")],
)
def test_exit_code_is_zero_if_a_method_fits(
    budget: str, code: int, verdict: str, invoke: Invoke, select_rows: Callable[..., None]
) -> None:
    """The JSON has the exit code too; a method that does not fit has a change or states that there is none."""
    select_rows("lora")
    result = invoke("model/config.json", "--budget", budget, "--json")
    assert result.exit_code == code, result.output
    answer = json.loads(result.stdout)
    row = answer["methods"][0]
    assert (answer["exit_code"], row["verdict"]) == (code, verdict)
    assert (row["change"] is None) == (code == 0)
    assert (row["longest_context"] is None) == (code == 1)
    assert answer["column_lengths"] == [256]
    assert invoke("model/config.json", "--budget", budget).exit_code == code


@pytest.mark.slow
def test_overrides_change_every_row_that_has_the_key(invoke: Invoke, select_rows: Callable[..., None]) -> None:
    """method.r=2 makes LoRA smaller; full fine-tuning has no such key, and its row has the reason."""
    select_rows("full", "lora")
    answers = [json.loads(invoke("model", "--budget", "4GiB", "--json", f"method.r={rank}").stdout) for rank in (2, 32)]
    small, large = (answer["methods"][1]["plan"]["phase_peaks"]["optimizer"]["live_bytes"] for answer in answers)
    assert small < large
    assert "method.r" in answers[0]["methods"][0]["reason"]


@pytest.mark.slow
def test_examples_give_length_labels_and_number(invoke: Invoke, select_rows: Callable[..., None]) -> None:
    """With a tokenizer, rows are as long as the longest example and have its labels; hours are for all examples."""
    select_rows("lora")
    result = invoke("shipped", "--budget", "4GiB", "--data", "pairs.jsonl", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["num_examples"] == len(PAIRS)
    assert answer["tokens_per_example"] < answer["reference_length"] < 128
    plan = answer["methods"][0]["plan"]
    assert plan["sequence_length"] == answer["reference_length"]
    assert any("(the most in the data)" in note for note in plan["notes"])


@pytest.mark.slow
def test_examples_without_a_tokenizer_are_not_measured(invoke: Invoke, select_rows: Callable[..., None]) -> None:
    """A note states it; rows have the length of --max-length."""
    select_rows("lora")
    result = invoke("model", "--budget", "4GiB", "--data", "pairs.jsonl", "--max-length", "64", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert "needs the model's tokenizer" in answer["notes"][0]
    assert answer["reference_length"] == 64


@pytest.mark.slow
def test_written_suites_load_and_state_their_plans(invoke: Invoke, select_rows: Callable[..., None]) -> None:
    """Each recipe has its plan in the header; a method with an engine is in a suite of its own, with its configs."""
    select_rows("full_zero2_offload", "lora", "last_layer")
    result = invoke("model", "--budget", "4GiB", "--write-suite", "mine")
    assert result.exit_code == 0, result.output
    assert "run them with: peftbench run mine/suite.yaml" in result.stderr
    recipes = expand(Path("mine/suite.yaml"))
    assert [recipe.name for recipe in recipes] == ["lora", "last_layer"]
    assert [recipe.train.gradient_checkpointing for recipe in recipes] == [True, False]
    header = Path("mine/lora.yaml").read_text(encoding="utf-8")
    assert "# Plan of this recipe: peftbench estimate mine/lora.yaml --budget 4096MiB\n" in header
    assert [recipe.name for recipe in expand(Path("mine/zero2_offload_suite.yaml"))] == ["full_zero2_offload"]
    config = resolve_accelerate_config(Path("mine/zero2_offload_suite.yaml"))
    assert config is not None
    assert "deepspeed_config_file: mine/zero2_offload.json" in config.read_text(encoding="utf-8")
    assert Path("mine/zero2_offload.json").is_file()


def test_suite_is_not_written_if_nothing_fits(invoke: Invoke, select_rows: Callable[..., None]) -> None:
    """The exit code is 1, and no folder is created."""
    select_rows("lora")
    assert invoke("model", "--budget", "4MiB", "--write-suite", "mine").exit_code == 1
    assert not Path("mine").exists()
