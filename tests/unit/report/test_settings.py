"""What was equal, what was not, and the commands that repeat a run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftbench.distributed.engines import ENGINES
from peftbench.recipe.loader import load_recipe, parse_recipe
from peftbench.record import Device, Engine, RunRecord
from peftbench.report.reproduce import reproduce_commands
from peftbench.report.settings import environment_settings, flatten, recipe_settings
from tests.helpers.paths import REPOSITORY
from tests.unit.report.records import record


def test_knobs_are_equal_or_counted() -> None:
    """A knob with one value is equal; another has each value with how many runs have it, and a lack of it counts."""
    rows = [record("a", "lora", 1, method={"r": 8}), record("b", "lora", 1, method={"r": 8}), record("c", "full", 1)]
    found = {knob.name: knob for knob in recipe_settings(rows)}
    assert found["train.global_batch_size"].is_constant
    assert found["train.global_batch_size"].runs_by_value == {"16": 3}
    assert found["method.kind"].runs_by_value == {"lora": 2, "full": 1}
    assert found["method.r"].runs_by_value == {"8": 2, "–": 1}
    assert "name" not in found
    assert "output_dir" not in found


def test_many_values_are_counted_and_not_listed() -> None:
    """Of a hundred values a dozen are shown, and how many more there are."""
    found = {knob.name: knob for knob in recipe_settings([record(f"a{s}", "full", 1, seed=s) for s in range(100)])}
    seeds = found["train.seed"]
    assert len(seeds.shown_values) == 12
    assert seeds.num_hidden_values == 88


def test_surroundings_say_where_and_with_what() -> None:
    """Device, engine, versions, commit and identities; what nothing tells is unknown."""
    one = record("a", "full", 1, library_versions={"torch": "2"}, git_commit="abc")
    found = {knob.name: knob.runs_by_value for knob in environment_settings([one])}
    assert found["torch"] == {"2": 1}
    assert found["commit"] == {"abc": 1}
    assert found["device"] == {"a CPU (cpu)": 1}
    assert found["device memory"] == {"unknown": 1}


def _engine(name: str) -> Engine:
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
def test_a_run_is_repeated_by_its_own_engine(engine: str, device: str, launcher: list[str]) -> None:
    """The command names the file of the engine that ran, as many processes, and the record, quoted for a shell."""
    one = record("a b", "full", 1, git_commit="abcd+changes", engine=_engine(engine))
    one = one.model_copy(update={"device": Device(type=device, name="x", num_processes=2)})
    lines = reproduce_commands(one, Path("runs/it's here/record.json"))
    saves = shlex.split(lines[0])
    assert saves[0] == "python"
    assert saves[-2:] == ["runs/it's here/record.json", "../a_b.json"]
    assert lines[1].startswith("git checkout abcd  # ")
    words = shlex.split(lines[-1])
    assert words[: len(launcher)] == launcher
    assert words[words.index("--config") + 1] == "../a_b.json"
    assert ("--num_processes" in words) == (engine != "single")
    assert words[-1] == "output_dir=runs_again"


def test_a_launcher_that_no_record_names_is_not_made_up() -> None:
    """Of a run in several processes the commands say so, before one that has a single process."""
    one = record("a", "full", 1).model_copy(update={"device": Device(type="cuda", name="x", num_processes=8)})
    *_, said, trains = reproduce_commands(one, Path("record.json"))
    assert said == "# the run used 8 processes; the record does not name the launcher"
    assert trains.startswith("python launch/train.py ")
    assert "#" not in "".join(reproduce_commands(record("a", "full", 1), Path("record.json"))[1:])


@pytest.mark.parametrize("git_commit", ["-f", "--orphan=x", "main", "", "+changes", "abcd\nrm x", "$(x)"])
def test_only_a_commit_is_checked_out(git_commit: str) -> None:
    """What a record has in its place may be an option, or another's branch."""
    lines = reproduce_commands(record("a", "full", 1, git_commit=git_commit), Path("record.json"))
    assert lines[1] == "# the commit of the run is unknown"
    assert not [line for line in lines if line.startswith("git")]


def test_no_file_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the recipe's name outside the checkout may be anything."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    monkeypatch.chdir(checkout)
    there = tmp_path / "a.json"
    for text in ("plain", "${x}"):
        one = record("a", "full", 1, method={"text": text})
        saves = reproduce_commands(one, one.write(checkout / "runs"))[0].replace(
            "python", shlex.quote(sys.executable), 1
        )
        there.write_text("mine", encoding="utf-8")
        done = subprocess.run(["bash", "-c", saves], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "FileExistsError" in done.stderr
        assert there.read_text(encoding="utf-8") == "mine"


LEAST: dict[str, Any] = {
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
def test_the_commands_give_the_same_recipe(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever texts a recipe holds: what the first command saves is read as the recipe, wherever it then writes to."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    monkeypatch.chdir(checkout)
    values = LEAST | {"output_dir": text, "data": LEAST["data"] | {"separator": text}}
    recipe = parse_recipe(values)
    one = record(f"../{text}", "full", 1).model_copy(update={"recipe": recipe.model_dump(mode="json")})
    place = one.write(checkout / "runs")
    saves, _, trains = reproduce_commands(one, place)
    assert str(tmp_path) not in saves
    subprocess.run(["bash", "-c", saves.replace("python", shlex.quote(sys.executable), 1)], check=True)
    (saved,) = tmp_path.glob("*.json")
    words = shlex.split(trains)
    assert Path(words[words.index("--config") + 1]).resolve() == saved
    assert load_recipe([saved]) == recipe
    assert load_recipe([saved], words[-1:]).output_dir == f"{Path(text)}_again"
    assert load_recipe([place]) == recipe


def test_a_recipe_is_saved_under_a_safe_name() -> None:
    """No name leads out of the folder, hides the file, or is longer than a file system takes."""
    for name in ("../../x", ".x", "-x", "a/b c\n", "é", "x" * 1000):
        word = shlex.split(reproduce_commands(record(name, "full", 1), Path("record.json"))[0])[-1]
        assert re.fullmatch(r"\.\./[\w=+,][\w.=+,-]{0,99}\.json", word, flags=re.ASCII), word


def test_groups_are_flattened() -> None:
    """By dotted places, below what is given; an empty group is a value."""
    assert dict(flatten({"a": {"b": 1, "c": {}}, "d": [2]}, "x.")) == {"x.a.b": 1, "x.a.c": {}, "x.d": [2]}


def test_every_engine_that_a_record_may_name_has_its_file() -> None:
    """No command names a file that is not there."""
    assert len(ENGINES) >= 5
    for name in ENGINES:
        one = record("a", "full", 1, engine=_engine(name))
        for device in ("cpu", "cuda"):
            here: RunRecord = one.model_copy(update={"device": Device(type=device, name="x", num_processes=2)})
            words = shlex.split(reproduce_commands(here, Path("record.json"))[-1])
            if "--config_file" in words:
                assert (REPOSITORY / words[words.index("--config_file") + 1]).is_file(), (name, device)
