"""The scripts that are written, letter by letter."""

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
from tests.unit.slurm.golden_scripts import KEPT, REFRESH, SCRIPTS

NASTY = """it's "a" $(touch HACKED) `touch HACKED` \\ run; touch HACKED & #"""


def test_there_are_scripts() -> None:
    """The list below is not empty, and no file is kept that nothing makes."""
    assert len(SCRIPTS) >= 5
    assert {path.stem for path in KEPT.glob("*.sbatch")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_what_was_kept(name: str) -> None:
    """What is submitted changes only on purpose."""
    kept, made = (KEPT / f"{name}.sbatch").read_text(encoding="utf-8"), render_script(SCRIPTS[name])
    difference = "\n".join(difflib.unified_diff(kept.splitlines(), made.splitlines(), "kept", "made", lineterm=""))
    assert kept == made, f"{name} is another script now; if it is meant to be, run\n    {REFRESH}\n\n{difference}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_can_read_it(name: str) -> None:
    """Every one is valid for bash."""
    done = subprocess.run(
        ["bash", "-n"], input=render_script(SCRIPTS[name]), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_name_is_a_name(tmp_path: Path) -> None:
    """Whatever a folder is called, nothing of it is carried out, and the run is told the very folder."""
    folder = tmp_path / NASTY / "run"
    folder.mkdir(parents=True)
    said = tmp_path / "said"
    stand_in = tmp_path / "bin"
    stand_in.mkdir()
    (stand_in / "srun").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {shlex.quote(str(said))}\n', encoding="utf-8")
    (stand_in / "srun").chmod(0o755)
    text = render_script(Job(name=NASTY, run_dirs=(folder,), log_dir=tmp_path / "logs"))
    environment = {"PATH": f"{stand_in}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", "-s"], input=text, text=True, cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(folder / "recipe.yaml") in said.read_text(encoding="utf-8")
    assert not list(tmp_path.rglob("HACKED"))


@pytest.mark.parametrize("what", ["name", "logs", "folders"])
def test_what_no_script_can_hold(what: str, tmp_path: Path) -> None:
    """A line's end in a name would begin a line of the script."""
    bad = "x\ntouch HACKED #"
    values: dict[str, Any] = {"name": "x", "logs": tmp_path, "folders": (tmp_path,)}
    values[what] = {"name": bad, "logs": tmp_path / bad, "folders": (tmp_path / bad,)}[what]
    with pytest.raises(SlurmError, match="a character that no job's script can"):
        Job(**values)
    with pytest.raises(SlurmError, match="backslash"):
        Job(name="x", run_dirs=(tmp_path,), log_dir=tmp_path / "a\\b")


def test_a_percent_is_a_percent(tmp_path: Path) -> None:
    """SLURM has patterns for the names of logs."""
    assert f"--output={tmp_path}/50%%j/%j.log" in render_script(
        Job(name="x", run_dirs=(tmp_path,), log_dir=tmp_path / "50%j")
    )


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[3].glob("launch/slurm/*.sbatch")), ids=lambda p: p.stem)
def test_bash_can_read_what_is_written_by_hand(path: Path) -> None:
    """Each script in launch/slurm is valid, and edited in one place."""
    text = path.read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert text.count("the one place to edit") == 1
    assert "--signal=B:USR1@120" in text


def test_there_are_scripts_by_hand() -> None:
    """The list above is not empty."""
    found = {path.stem for path in Path(__file__).parents[3].glob("launch/slurm/*.sbatch")}
    assert found == {"single_gpu", "multi_gpu", "multi_node", "array"}
    assert shutil.which("bash")
