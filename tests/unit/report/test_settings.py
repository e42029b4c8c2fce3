"""Settings that runs share or that differ, and the commands that reproduce a run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftbench.common.nested_keys import flatten_keys
from peftbench.distributed.engines import ENGINES
from peftbench.recipe.loader import load_recipe, parse_recipe
from peftbench.record import Device, Engine, RunRecord
from peftbench.report.reproduce import reproduce_commands
from peftbench.report.settings import environment_settings, recipe_settings
from tests.helpers.paths import REPOSITORY
from tests.unit.report.records import build_record


def test_settings_are_constant_or_counted_by_value() -> None:
    """Count the runs of each value of a key; a missing key counts as a value."""
    rows = [
        build_record("a", "lora", 1, method={"r": 8}),
        build_record("b", "lora", 1, method={"r": 8}),
        build_record("c", "full", 1),
    ]
    settings = {setting.name: setting for setting in recipe_settings(rows)}
    assert settings["train.global_batch_size"].is_constant
    assert settings["train.global_batch_size"].runs_by_value == {"16": 3}
    assert settings["method.kind"].runs_by_value == {"lora": 2, "full": 1}
    assert settings["method.r"].runs_by_value == {"8": 2, "–": 1}
    assert "name" not in settings
    assert "output_dir" not in settings


def test_list_of_values_is_truncated() -> None:
    """Show 12 of 100 values, and count the hidden ones."""
    rows = [build_record(f"a{s}", "full", 1, seed=s) for s in range(100)]
    settings = {setting.name: setting for setting in recipe_settings(rows)}
    seeds = settings["train.seed"]
    assert len(seeds.shown_values) == 12
    assert seeds.num_hidden_values == 88


def test_environment_settings_have_versions_commit_and_device() -> None:
    """Check that a value missing from the record is unknown."""
    run_record = build_record("a", "full", 1, library_versions={"torch": "2"}, git_commit="abc")
    settings = {setting.name: setting.runs_by_value for setting in environment_settings([run_record])}
    assert settings["torch"] == {"2": 1}
    assert settings["commit"] == {"abc": 1}
    assert settings["device"] == {"a CPU (cpu)": 1}
    assert settings["device memory"] == {"unknown": 1}


def _build_engine(name: str) -> Engine:
    return Engine(
        name=name,
        distributed_type="X",
        mixed_precision="bf16",
        optimizer_class="AdamW",
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        num_threads=1,
    )


@pytest.mark.parametrize(
    ("engine", "device", "launcher"),
    [
        ("single", "cuda", ["python", "launch/train.py"]),
        ("ddp", "cpu", ["accelerate", "launch", "--config_file", "accel_configs/cpu2.yaml"]),
        ("zero2", "cuda", ["accelerate", "launch", "--config_file", "accel_configs/zero2.yaml"]),
    ],
)
def test_reproduce_commands_use_the_engine_of_the_run(engine: str, device: str, launcher: list[str]) -> None:
    """Check the launcher and its config file, the number of processes and the record's path, quoted for a shell."""
    run_record = build_record("a b", "full", 1, git_commit="abcd+changes", engine=_build_engine(engine))
    run_record = run_record.model_copy(update={"device": Device(type=device, name="x", num_processes=2)})
    lines = reproduce_commands(run_record, Path("runs/it's here/record.json"))
    save_arguments = shlex.split(lines[0])
    assert save_arguments[0] == "python"
    assert save_arguments[-2:] == ["runs/it's here/record.json", "../a_b.json"]
    assert lines[1].startswith("git checkout abcd  # ")
    arguments = shlex.split(lines[-1])
    assert arguments[: len(launcher)] == launcher
    assert arguments[arguments.index("--config") + 1] == "../a_b.json"
    assert ("--num_processes" in arguments) == (engine != "single")
    assert arguments[-1] == "output_dir=runs_again"


def test_unknown_launcher_is_noted_in_a_comment() -> None:
    """Print a comment with the number of processes before a command with a single process."""
    run_record = build_record("a", "full", 1).model_copy(
        update={"device": Device(type="cuda", name="x", num_processes=8)}
    )
    *_, comment, train_command = reproduce_commands(run_record, Path("record.json"))
    assert comment == "# the run used 8 processes; the record does not name the launcher"
    assert train_command.startswith("python launch/train.py ")
    assert "#" not in "".join(reproduce_commands(build_record("a", "full", 1), Path("record.json"))[1:])


@pytest.mark.parametrize("git_commit", ["-f", "--orphan=x", "main", "", "+changes", "abcd\nrm x", "$(x)"])
def test_only_a_commit_hash_is_checked_out(git_commit: str) -> None:
    """Reject options, branch names and shell code in place of a commit hash."""
    lines = reproduce_commands(build_record("a", "full", 1, git_commit=git_commit), Path("record.json"))
    assert lines[1] == "# the commit of the run is unknown"
    assert not [line for line in lines if line.startswith("git")]


def test_save_command_overwrites_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the command fails if a file with the recipe's name exists outside the checkout."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    monkeypatch.chdir(checkout)
    existing_file = tmp_path / "a.json"
    for text in ("plain", "${x}"):
        run_record = build_record("a", "full", 1, method={"text": text})
        save_command = reproduce_commands(run_record, run_record.write(checkout / "runs"))[0].replace(
            "python", shlex.quote(sys.executable), 1
        )
        existing_file.write_text("mine", encoding="utf-8")
        result = subprocess.run(["bash", "-c", save_command], capture_output=True, text=True, check=False)
        assert result.returncode != 0
        assert "FileExistsError" in result.stderr
        assert existing_file.read_text(encoding="utf-8") == "mine"


MINIMAL_RECIPE: dict[str, Any] = {
    "name": "x",
    "data": {"source": {"kind": "docstrings"}},
    "method": {"kind": "full"},
    "train": {"steps": 10},
    "optimizer": {"learning_rate": 1e-05},
}


@pytest.mark.parametrize(
    "text",
    [
        "a ${b} c",
        r"\${data.seed}",
        r"\\${x} ${y}",
        "${",
        "1e3",
        "null",
        "a: b",
        "two\nlines",
        "#",
        "é '\"",
        "😀",
        "a b",
        "/",
        "~",
    ],
)
def test_reproduce_commands_restore_the_recipe(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the first command and load the file it saves: only output_dir differs, whatever text the recipe contains."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    monkeypatch.chdir(checkout)
    values = MINIMAL_RECIPE | {"output_dir": text, "task": {"kind": "summarization", "separator": text}}
    recipe = parse_recipe(values)
    run_record = build_record(f"../{text}", "full", 1).model_copy(update={"recipe": recipe.model_dump(mode="json")})
    record_path = run_record.write(checkout / "runs")
    save_command, _, train_command = reproduce_commands(run_record, record_path)
    assert str(tmp_path) not in save_command
    subprocess.run(["bash", "-c", save_command.replace("python", shlex.quote(sys.executable), 1)], check=True)
    (saved,) = tmp_path.glob("*.json")
    arguments = shlex.split(train_command)
    assert Path(arguments[arguments.index("--config") + 1]).resolve() == saved
    assert load_recipe([saved]) == recipe
    assert load_recipe([saved], arguments[-1:]).output_dir == f"{Path(recipe.output_dir)}_again"
    assert load_recipe([record_path]) == recipe


def test_saved_recipe_has_a_safe_file_name() -> None:
    """Check that no run name leaves the folder, hides the file or exceeds the length limit of file systems."""
    for name in ("../../x", ".x", "-x", "a/b c\n", "é", "x" * 1000):
        file_name = shlex.split(reproduce_commands(build_record(name, "full", 1), Path("record.json"))[0])[-1]
        assert re.fullmatch(r"\.\./[\w=+,][\w.=+,-]{0,99}\.json", file_name, flags=re.ASCII), file_name


def test_flatten_returns_dotted_keys() -> None:
    """Prepend the given prefix; an empty section is a value."""
    assert dict(flatten_keys({"a": {"b": 1, "c": {}}, "d": [2]}, "x.")) == {"x.a.b": 1, "x.a.c": {}, "x.d": [2]}


def test_every_engine_has_its_config_file() -> None:
    """Check that each command names an existing file."""
    assert len(ENGINES) >= 5
    for name in ENGINES:
        base = build_record("a", "full", 1, engine=_build_engine(name))
        for device in ("cpu", "cuda"):
            run_record: RunRecord = base.model_copy(update={"device": Device(type=device, name="x", num_processes=2)})
            arguments = shlex.split(reproduce_commands(run_record, Path("record.json"))[-1])
            if "--config_file" in arguments:
                assert (REPOSITORY / arguments[arguments.index("--config_file") + 1]).is_file(), (name, device)
