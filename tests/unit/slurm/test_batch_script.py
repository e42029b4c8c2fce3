"""Batch scripts: exact text, valid bash, quoting."""

from __future__ import annotations

import difflib
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from peftbench.errors import SlurmError
from peftbench.slurm.batch_script import Job, render_script
from tests.unit.slurm.golden_scripts import GOLDEN_DIR, REFRESH, SCRIPTS

HOSTILE_NAME = """it's "a" $(touch HACKED) `touch HACKED` \\ run; touch HACKED & #"""


def test_golden_files_match_the_list_of_jobs() -> None:
    """Each job has a golden file, and each golden file a job."""
    assert len(SCRIPTS) >= 5
    assert {path.stem for path in GOLDEN_DIR.glob("*.sbatch")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_equals_golden_file(name: str) -> None:
    """A rendered script equals its golden file and is valid bash."""
    expected, actual = (GOLDEN_DIR / f"{name}.sbatch").read_text(encoding="utf-8"), render_script(SCRIPTS[name])
    diff = "\n".join(difflib.unified_diff(expected.splitlines(), actual.splitlines(), "golden", "actual", lineterm=""))
    assert expected == actual, f"{name} has changed; if that is intended, run\n    {REFRESH}\n\n{diff}"
    done = subprocess.run(["bash", "-n"], input=actual, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_folder_name_is_quoted(tmp_path: Path) -> None:
    """Shell syntax in a folder's name is not executed, and the run gets the exact path."""
    folder = tmp_path / HOSTILE_NAME / "run"
    folder.mkdir(parents=True)
    arguments = tmp_path / "arguments"
    fake_bin = tmp_path / "bin"
    fake_bin.mkdir()
    (fake_bin / "srun").write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" > {shlex.quote(str(arguments))}\n', encoding="utf-8"
    )
    (fake_bin / "srun").chmod(0o755)
    text = render_script(Job(name=HOSTILE_NAME, run_dirs=(folder,), log_dir=tmp_path / "logs"))
    environment = {"PATH": f"{fake_bin}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", "-s"], input=text, text=True, cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(folder / "recipe.yaml") in arguments.read_text(encoding="utf-8")
    assert not list(tmp_path.rglob("HACKED"))


@pytest.mark.parametrize(
    ("prologue", "is_started"),
    [
        (("export GREETING=hello",), True),
        (("load() { return 3; }", "load cuda  # fails", "export GREETING=hello"), False),
        (("export GREETING=hello", "false"), False),
        (("if true; then\n  export GREETING=hello\nfi",), True),
        (("no_such_command",), False),
    ],
)
def test_prologue_comes_before_the_run(prologue: tuple[str, ...], is_started: bool, tmp_path: Path) -> None:
    """The run has its exports; a command that fails ends the job before the run starts."""
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text(f'#!/bin/bash\nprintf "$GREETING" > "{tmp_path}/started"\n', encoding="utf-8")
    srun.chmod(0o755)
    text = render_script(Job(name="x", run_dirs=(tmp_path,), log_dir=tmp_path, prologue=prologue))
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", "-s"], input=text, text=True, cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    started = tmp_path / "started"
    assert done.returncode == (0 if is_started else 1)
    assert (started.read_text(encoding="utf-8") if started.exists() else None) == ("hello" if is_started else None)


@pytest.mark.parametrize("field", ["name", "log_dir", "run_dirs"])
def test_control_characters_are_refused(field: str, tmp_path: Path) -> None:
    """A newline in a name would start a new line of the script; a backslash in a log path disables its patterns."""
    bad = "x\ntouch HACKED #"
    values: dict[str, Any] = {"name": "x", "log_dir": tmp_path, "run_dirs": (tmp_path,)}
    values[field] = {"name": bad, "log_dir": tmp_path / bad, "run_dirs": (tmp_path / bad,)}[field]
    with pytest.raises(SlurmError, match="has a control character, which a batch script cannot contain"):
        Job(**values)
    with pytest.raises(SlurmError, match="backslash"):
        Job(name="x", run_dirs=(tmp_path,), log_dir=tmp_path / "a\\b")


def test_percent_in_log_path_is_escaped(tmp_path: Path) -> None:
    """A % in a folder's name is not expanded by SLURM's log name patterns."""
    assert f"--output={tmp_path}/50%%j/%j.log" in render_script(
        Job(name="x", run_dirs=(tmp_path,), log_dir=tmp_path / "50%j")
    )


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[3].glob("launch/slurm/*.sbatch")), ids=lambda p: p.stem)
def test_launch_script_is_valid_bash(path: Path) -> None:
    """Each script in launch/slurm is valid and has one block of settings."""
    text = path.read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert text.count("settings to edit") == 1
    assert "--signal=B:USR1@120" in text


def test_launch_scripts_exist() -> None:
    """The test above needs a complete list."""
    names = {path.stem for path in Path(__file__).parents[3].glob("launch/slurm/*.sbatch")}
    assert names == {"single_gpu", "multi_gpu", "multi_node", "array"}
    assert shutil.which("bash")
