"""What peftbench submit writes, hands in, leaves out and refuses; sbatch is a stand-in that notes what it is told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from peftbench.cli.app import app
from peftbench.recipe.loader import load_recipe
from peftbench.run_dir.lock import Lock
from peftbench.slurm.job_file import read_job_file
from tests.helpers.paths import REPOSITORY
from tests.unit.report.records import record

Submit = Callable[..., Result]


@pytest.fixture
def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submit:
    """The command, in a folder with a suite of two recipes; with nothing of SLURM but what a test puts there."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("one", "two"):
        recipe: dict[str, object] = {
            "name": name,
            "output_dir": "out",
            "method": {"kind": "lora"},
            "train": {"steps": 1},
        }
        recipe["data"] = {"source": {"kind": "files", "train": "rows.jsonl"}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (folder / "rows.jsonl").write_text(json.dumps({"article": "a", "summary": "s"}) + "\n", encoding="utf-8")
    (folder / "suite.yaml").write_text("name: both\nrecipes: [one.yaml, two.yaml]\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return lambda *words: CliRunner().invoke(app, ["submit", *words])


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[[str, str], Path]:
    """Given what squeue prints and what sbatch does, where sbatch has written what it was told."""

    def made(queue: str = "", sbatch: str = "echo 12") -> Path:
        folder, told = tmp_path / "bin", tmp_path / "told"
        folder.mkdir(exist_ok=True)
        scripts = {
            "squeue": f"printf '{queue}'",
            "sbatch": f'printf "%s\\n" "$@" > "{told}"; /usr/bin/env > "{told}.env"; {sbatch}',
        }
        for name, text in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
            (folder / name).chmod(0o755)
        return told

    return made


def test_a_dry_run_writes_all_and_hands_in_nothing(submit: Submit) -> None:
    """The script is printed and lies there, beside resolved recipes with absolute folders."""
    said = submit("suite.yaml", "--dry-run", "slurm.time=4:00:00", "--at-once", "1", "train.steps=3")
    assert said.exit_code == 0, said.output
    assert "#SBATCH --array=0-1%1\n" in said.stdout
    assert "#SBATCH --time=4:00:00\n" in said.stdout
    assert said.stdout == Path("out/job.sbatch").read_text(encoding="utf-8") + "\n"
    for name in ("one", "two"):
        recipe = load_recipe([Path("out") / name / "recipe.yaml"], [])
        assert (recipe.name, recipe.train.steps) == (name, 3)
        assert recipe.output_dir == str(Path("out").resolve())
        assert read_job_file(Path("out") / name) is None


@pytest.mark.parametrize(("target", "names"), [("suite.yaml", ("one", "two")), ("two.yaml", ("two",))])
def test_each_run_with_several_seeds(submit: Submit, target: str, names: tuple[str, ...]) -> None:
    """A suite and a single recipe alike become a job array with a task for each seed."""
    said = submit(target, "--dry-run", "--seeds", "2")
    assert said.exit_code == 0, said.output
    assert f"#SBATCH --array=0-{2 * len(names) - 1}\n" in said.stdout
    for name in names:
        for seed in (0, 1):
            recipe = load_recipe([Path("out") / f"{name}-seed={seed}" / "recipe.yaml"], [])
            assert (recipe.name, recipe.train.seed) == (f"{name}-seed={seed}", seed)


def test_it_is_handed_in(submit: Submit, slurm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With its options on the command line too, and nothing of a job around it; how to follow is said."""
    told = slurm(sbatch="echo '12;cluster'")
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_CONF"):
        monkeypatch.setenv(name, "7")
    said = submit("suite.yaml", "slurm.comment=a b; $(c)")
    assert said.exit_code == 0, said.output
    words = told.read_text(encoding="utf-8").splitlines()
    assert words[0] == "--parsable"
    assert "--array=0-1" in words
    assert "--comment=a b; $(c)" in words
    assert words[-1] == str(Path("out/job.sbatch").resolve())
    environment = Path(f"{told}.env").read_text(encoding="utf-8")
    assert "SLURM_CONF=7" in environment
    assert "SLURM_ARRAY_TASK_ID" not in environment
    assert "SLURM_RESTART_COUNT" not in environment
    for line in ("submitted job 12: 2 runs", "peftbench status", "scancel 12", "peftbench report"):
        assert line in said.stdout
    assert [
        (found.job_id, found.log_path) for name in ("one", "two") if (found := read_job_file(Path("out") / name))
    ] == [(f"12_{index}", str(Path(f"out/slurm/12_{index}.log").resolve())) for index in (0, 1)]


def test_nothing_is_done_twice(submit: Submit, slurm: Callable[..., Path]) -> None:
    """Runs with a result, in the queue, or of a process are left out, which is said; a job that ends is in it too."""
    slurm()
    assert submit("suite.yaml").exit_code == 0
    slurm("12_0|PENDING|Priority\\n12_1|COMPLETING|None\\n")
    said = submit("suite.yaml")
    assert said.stdout == "nothing is left to submit\n"
    assert "2 under way already, left out: job 12_0, job 12_1" in said.stderr
    told = slurm("12_0|PENDING|Priority\\n", "echo 13")
    lock = Lock(Path("out/two"))
    lock.acquire()
    assert "a process, in" in submit("suite.yaml").stderr
    lock.release()
    recipe = load_recipe([Path("out/two/recipe.yaml")], [])
    values = {"recipe_fingerprint": recipe.fingerprint(), "data_identity": recipe.data.source.fingerprint()}
    record("two", "lora", 1, **values).write(Path("out/two"))
    said = submit("suite.yaml")
    assert said.stdout == "nothing is left to submit\n"
    assert "1 has a result already, left out" in said.stderr
    slurm("", "echo 14")
    assert "submitted job 14: 1 run," in submit("suite.yaml").stdout
    assert "--array" not in told.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["nothing.yaml"], 14, "there is no file nothing.yaml"),
        (["one.yaml", "--engine", "zero9"], 14, "there is no engine 'zero9'; did you mean 'zero"),
        (["one.yaml", "--nodes", "2"], 90, "--nodes wants an engine"),
        (["one.yaml", "slurm.partiton=x"], 90, "did you mean 'partition'? (allowed: account, "),
        (["one.yaml", "slurm.array=1"], 90, "slurm.array is set by peftbench itself: one task a run; --at-once"),
        (["one.yaml", "slurm.time=2"], 91, "told to stop 120 s before its end"),
        (["one.yaml", "slurm.signal=TERM@9"], 90, "is not what a job's script hears; give B:USR1@SECONDS"),
        (["one.yaml", "--out", "a\nb"], 90, "a character that no job's script can"),
    ],
)
def test_what_cannot_be_meant(words: list[str], code: int, sentence: str, submit: Submit) -> None:
    """One sentence, an exit code of its own, and nothing is written."""
    before = sorted(Path().rglob("*"))
    said = submit(*words)
    assert said.exit_code == code, said.output
    assert sentence in said.stderr
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("sbatch", "sentence"),
    [(None, "there is no sbatch on this machine"), ("echo invalid partition >&2; exit 1", "sbatch refused")],
)
def test_slurm_does_not_take_it(sbatch: str | None, sentence: str, submit: Submit, slurm: Callable[..., Path]) -> None:
    """Where there is none, or it refuses, the script lies there all the same."""
    if sbatch is not None:
        slurm(sbatch=sbatch)
    said = submit("one.yaml")
    assert said.exit_code == 90
    assert sentence in said.stderr
    assert Path("out/one/job.sbatch").is_file()
    assert read_job_file(Path("out/one")) is None


def test_a_queue_that_does_not_answer(submit: Submit, slurm: Callable[..., Path], tmp_path: Path) -> None:
    """What is in it already nobody knows: nothing is handed in twice by guess."""
    slurm()
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho down >&2; exit 1\n", encoding="utf-8")
    said = submit("one.yaml")
    assert said.exit_code == 90
    assert "squeue does not answer (down); try again when it does" in said.stderr
    told = CliRunner().invoke(app, ["status", "."])
    assert told.exit_code != 0
    assert "from the files alone, for squeue does not answer (down)" in told.stderr


def test_an_engine_comes_along(submit: Submit) -> None:
    """Its file and DeepSpeed's, with as many processes as the job has; a file that is asked for by path as well."""
    said = submit("one.yaml", "--engine", "zero2", "--nodes", "3", "--gpus-per-node", "4", "--dry-run")
    assert said.exit_code == 0, said.output
    assert "#SBATCH --nodes=3\n" in said.stdout
    folder = Path("out/one").resolve()
    engine = yaml.safe_load((folder / "accelerate.yaml").read_text(encoding="utf-8"))
    assert (engine["num_machines"], engine["num_processes"], engine["same_network"]) == (3, 12, False)
    assert engine["deepspeed_config"]["deepspeed_config_file"] == str(folder / "deepspeed.json")
    assert (folder / "deepspeed.json").read_text() == (REPOSITORY / "ds_configs" / "zero2.json").read_text()
    (folder / "mine.yaml").write_text("num_processes: many\n", encoding="utf-8")
    said = submit("one.yaml", "--engine", str(folder / "mine.yaml"))
    assert said.exit_code == 90
    assert "must be whole numbers" in said.stderr


def test_its_own_environment_runs_it(submit: Submit) -> None:
    """The script names this very Python, and is valid."""
    text = submit("one.yaml", "--dry-run").stdout
    assert subprocess.run(["/bin/bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert sys.executable in text
