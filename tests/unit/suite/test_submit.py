"""``peftbench submit``: files, skipped runs, errors. A fake sbatch records its arguments."""

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
from peftbench.training.auto_settings import resolve_task
from tests.helpers.paths import REPOSITORY
from tests.helpers.records import minimal_record

Submit = Callable[..., Result]


@pytest.fixture
def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submit:
    """Return a function that runs ``submit`` in a folder with a suite of two recipes, without SLURM commands."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("one", "two"):
        recipe: dict[str, object] = {
            "name": name,
            "output_dir": "out",
            "method": {"kind": "lora"},
            "train": {"steps": 1, "precision": "fp32"},
            "model": {"attention": "sdpa"},
        }
        recipe["data"] = {"source": {"kind": "files", "train": "rows.jsonl"}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (folder / "rows.jsonl").write_text(json.dumps({"article": "a", "summary": "s"}) + "\n", encoding="utf-8")
    (folder / "suite.yaml").write_text("name: both\nrecipes: [one.yaml, two.yaml]\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return lambda *arguments: CliRunner().invoke(app, ["submit", *arguments])


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[[str, str], Path]:
    """Return a function that installs fake squeue and sbatch, and returns the file with sbatch's arguments."""

    def install(queue: str = "", sbatch: str = "echo 12") -> Path:
        folder, arguments = tmp_path / "bin", tmp_path / "arguments"
        folder.mkdir(exist_ok=True)
        scripts = {
            "squeue": f"printf '{queue}'",
            "sbatch": f'printf "%s\\n" "$@" > "{arguments}"; /usr/bin/env > "{arguments}.env"; {sbatch}',
        }
        for name, text in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
            (folder / name).chmod(0o755)
        return arguments

    return install


def test_dry_run_writes_files_and_submits_nothing(submit: Submit) -> None:
    """The script is printed and written, and the resolved recipes have absolute folders."""
    result = submit("suite.yaml", "--dry-run", "slurm.time=4:00:00", "--max-parallel", "1", "train.steps=3")
    assert result.exit_code == 0, result.output
    assert "#SBATCH --array=0-1%1\n" in result.stdout
    assert "#SBATCH --time=4:00:00\n" in result.stdout
    assert result.stdout == Path("out/job.sbatch").read_text(encoding="utf-8") + "\n"
    for name in ("one", "two"):
        recipe = load_recipe([Path("out") / name / "recipe.yaml"], [])
        assert (recipe.name, recipe.train.steps) == (name, 3)
        assert recipe.output_dir == str(Path("out").resolve())
        assert read_job_file(Path("out") / name) is None


@pytest.mark.parametrize(("target", "names"), [("suite.yaml", ("one", "two")), ("two.yaml", ("two",))])
def test_seeds_become_array_tasks(submit: Submit, target: str, names: tuple[str, ...]) -> None:
    """A suite and a single recipe become a job array with one task per seed."""
    result = submit(target, "--dry-run", "--seeds", "2")
    assert result.exit_code == 0, result.output
    assert f"#SBATCH --array=0-{2 * len(names) - 1}\n" in result.stdout
    for name in names:
        for seed in (0, 1):
            recipe = load_recipe([Path("out") / f"{name}-seed={seed}" / "recipe.yaml"], [])
            assert (recipe.name, recipe.train.seed) == (f"{name}-seed={seed}", seed)


def test_submit_passes_options_and_a_clean_environment(
    submit: Submit, slurm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options become arguments; sbatch receives no variables of an enclosing job; the next commands are printed."""
    argument_file = slurm(sbatch="echo '12;cluster'")
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_CONF"):
        monkeypatch.setenv(name, "7")
    result = submit("suite.yaml", "slurm.comment=a b; $(c)")
    assert result.exit_code == 0, result.output
    arguments = argument_file.read_text(encoding="utf-8").splitlines()
    assert arguments[0] == "--parsable"
    assert "--array=0-1" in arguments
    assert "--comment=a b; $(c)" in arguments
    assert arguments[-1] == str(Path("out/job.sbatch").resolve())
    environment = Path(f"{argument_file}.env").read_text(encoding="utf-8")
    assert "SLURM_CONF=7" in environment
    assert "SLURM_ARRAY_TASK_ID" not in environment
    assert "SLURM_RESTART_COUNT" not in environment
    for line in ("submitted job 12: 2 runs", "peftbench status", "scancel 12", "peftbench report"):
        assert line in result.stdout
    assert [(job.job_id, job.log_path) for name in ("one", "two") if (job := read_job_file(Path("out") / name))] == [
        (f"12_{index}", str(Path(f"out/slurm/12_{index}.log").resolve())) for index in (0, 1)
    ]


def test_active_and_finished_runs_are_skipped(submit: Submit, slurm: Callable[..., Path]) -> None:
    """Runs with a result, in the queue (also while completing), or of another process are skipped with a message."""
    slurm()
    assert submit("suite.yaml").exit_code == 0
    slurm("12_0|PENDING|Priority\\n12_1|COMPLETING|None\\n")
    result = submit("suite.yaml")
    assert result.stdout == "nothing left to submit\n"
    assert "skipped 2 runs already queued or running: job 12_0, job 12_1" in result.stderr
    argument_file = slurm("12_0|PENDING|Priority\\n", "echo 13")
    lock = Lock(Path("out/two"))
    lock.acquire()
    assert "a process in" in submit("suite.yaml").stderr
    lock.release()
    recipe = resolve_task(load_recipe([Path("out/two/recipe.yaml")], []))[0].with_resolved_dtype()
    values = {"recipe_fingerprint": recipe.fingerprint(), "data_fingerprint": recipe.data.source.fingerprint()}
    minimal_record(name="two", **values).write(Path("out/two"))
    Path("out/two/model").mkdir()
    result = submit("suite.yaml")
    assert result.stdout == "nothing left to submit\n"
    assert "skipped 1 run with a result" in result.stderr
    slurm("", "echo 14")
    assert "submitted job 14: 1 run," in submit("suite.yaml").stdout
    assert "--array" not in argument_file.read_text(encoding="utf-8")


def _get_gpu_lines(script: str) -> list[str]:
    return [line for line in script.splitlines() if line.startswith("#SBATCH") and ("gpu" in line or "gres" in line)]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--gpus-per-node=1"),
        (["slurm.gres=gpu:a100:1"], "--gres=gpu:a100:1"),
        (["slurm.gpus=a100:1"], "--gpus=a100:1"),
        (["slurm.gpus_per_node=a100:1"], "--gpus-per-node=a100:1"),
        (["slurm.gpus_per_task=a100:1"], "--gpus-per-task=a100:1"),
        (["--gpus-per-node", "a100:2"], "--gpus-per-node=a100:2"),
        (["--gpus-per-node", "0"], None),
    ],
)
def test_script_has_one_line_with_gpus(arguments: list[str], line: str | None, submit: Submit) -> None:
    """It is the line that the user asked for."""
    result = submit("one.yaml", "--dry-run", *arguments)
    assert result.exit_code == 0, result.output
    assert _get_gpu_lines(result.stdout) == ([] if line is None else [f"#SBATCH {line}"])


@pytest.mark.parametrize("request_", ["slurm.gres=gpu:a100:3", "slurm.gpus=a100:3", "slurm.gpus_per_task=3"])
def test_number_of_processes_is_that_of_the_gpus(request_: str, submit: Submit) -> None:
    """Typed GPUs are counted, whichever option requests them."""
    result = submit("one.yaml", "--dry-run", "--accelerate", "zero2", request_)
    assert result.exit_code == 0, result.output
    engine = yaml.safe_load(Path("out/one/accelerate.yaml").read_text(encoding="utf-8"))
    assert engine["num_processes"] == 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--gres=gpu:a100:2"),
        (["slurm.gpus=1"], "--gpus=1"),
        (["--gpus-per-node", "h100:1"], "--gpus-per-node=h100:1"),
        (["slurm.gres=null"], "--gpus-per-node=1"),
        (["slurm.gres=gpu:1"], "--gres=gpu:1"),
        (["--gpus-per-node", "0"], None),
    ],
)
def test_command_line_replaces_the_gpus_of_the_suite(arguments: list[str], line: str | None, submit: Submit) -> None:
    """A request of another kind replaces it too; other options of the suite are kept."""
    suite = "name: both\nrecipes: [one.yaml]\nslurm: {gres: gpu:a100:2, cpus_per_task: 4}\n"
    Path("suite.yaml").write_text(suite, encoding="utf-8")
    result = submit("suite.yaml", "--dry-run", *arguments)
    assert result.exit_code == 0, result.output
    assert _get_gpu_lines(result.stdout) == ([] if line is None else [f"#SBATCH {line}"])
    assert "#SBATCH --cpus-per-task=4\n" in result.stdout


def test_prologue_is_that_of_the_suite_or_the_command_line(submit: Submit) -> None:
    """The lines come before the launch; those of the command line replace the suite's, and null removes them."""
    commands = "slurm:\n  prologue:\n  - module load cuda\n  - export A='b c'\n"
    Path("suite.yaml").write_text(f"name: both\nrecipes: [one.yaml]\n{commands}", encoding="utf-8")
    text = submit("suite.yaml", "--dry-run").stdout
    assert text.index("module load cuda\n") < text.index("export A='b c'\n") < text.index("\nsrun ")
    assert "prologue=" not in text
    text = submit("suite.yaml", "--dry-run", "slurm.prologue=conda activate x", "slurm.prologue=export B=$HOME").stdout
    assert "conda activate x\n" in text
    assert "export B=$HOME\n" in text
    assert "module load" not in text
    assert "module load" not in submit("suite.yaml", "--dry-run", "slurm.prologue=null").stdout


def test_large_array_is_split(submit: Submit, slurm: Callable[..., Path], tmp_path: Path) -> None:
    """Each job has at most MaxArraySize tasks; every run's job file names its job, and the limit of tasks is shared."""
    argument_file = slurm(sbatch="echo 1$(ls out/*/job.json 2>/dev/null | /usr/bin/wc -l)")
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 'MaxArraySize            = 3'\n", encoding="utf-8")
    scontrol.chmod(0o755)
    (tmp_path / "bin" / "ls").symlink_to("/bin/ls")
    result = submit("suite.yaml", "--seeds", "4", "--max-parallel", "5")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("submitted job ") == 3
    assert "scancel 10 13 16\n" in result.stdout
    scripts = [Path(f"out/job-{number}.sbatch").read_text(encoding="utf-8") for number in (1, 2, 3)]
    assert [script.count("/one-seed=") for script in scripts] == [3, 1, 0]
    limits = [line for script in scripts for line in script.splitlines() if "--array" in line]
    assert limits == ["#SBATCH --array=0-2%1", "#SBATCH --array=0-2%2", "#SBATCH --array=0-1%2"]
    jobs = sorted(str(job.job_id) for path in Path("out").glob("*-seed=*") if (job := read_job_file(path)))
    assert jobs == [f"1{3 * part}_{task}" for part, tasks in enumerate((3, 3, 2)) for task in range(tasks)]
    assert "--array=0-1%2" in argument_file.read_text(encoding="utf-8").splitlines()


def test_array_of_the_limit_is_one_job(submit: Submit, slurm: Callable[..., Path], tmp_path: Path) -> None:
    """Without a readable limit, SLURM's default applies; more arrays than --max-parallel tasks are refused."""
    slurm()
    assert submit("suite.yaml", "--seeds", "4", "--dry-run").stdout.count("#!/bin/bash") == 1
    scontrol = tmp_path / "bin" / "scontrol"
    for text, num_jobs in (("echo MaxArraySize = 8", 1), ("echo MaxArraySize = 7", 2), ("exit 1", 1), ("echo ?", 1)):
        scontrol.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        scontrol.chmod(0o755)
        assert submit("suite.yaml", "--seeds", "4", "--dry-run").stdout.count("#!/bin/bash") == num_jobs
    scontrol.write_text("#!/bin/sh\necho MaxArraySize = 2\n", encoding="utf-8")
    before = sorted(Path().rglob("*"))
    result = submit("suite.yaml", "--seeds", "5", "--max-parallel", "4")
    assert result.exit_code == 90
    assert "10 runs need 5 job arrays (MaxArraySize is 2)" in result.stderr
    assert sorted(Path().rglob("*")) == before


def test_second_job_that_is_refused_names_the_first(submit: Submit, slurm: Callable[..., Path], tmp_path: Path) -> None:
    """The first job runs, so its runs are skipped by the next submission."""
    slurm(sbatch=f'[ -e "{tmp_path}/once" ] && {{ echo limit reached >&2; exit 1; }}; : >"{tmp_path}/once"; echo 12')
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\necho MaxArraySize = 1\n", encoding="utf-8")
    scontrol.chmod(0o755)
    result = submit("suite.yaml")
    assert result.exit_code == 90
    message = "limit reached (submitted before: job 12); run the same command again to submit the other runs"
    assert message in result.stderr
    assert [read_job_file(Path("out") / name) is None for name in ("one", "two")] == [False, True]


@pytest.mark.parametrize("key", ["train.precision=auto", "model.attention=auto"])
def test_finished_run_with_auto_settings_is_submitted(key: str, submit: Submit, slurm: Callable[..., Path]) -> None:
    """The login node cannot resolve auto; the job skips the run if its device resolves it to the recorded value.

    It resolves the task and, where the precision is given, the type of frozen weights.
    """
    slurm()
    recipe = resolve_task(load_recipe([Path("two.yaml")], []))[0].with_resolved_dtype()
    values = {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_fingerprint": recipe.fingerprint(),
        "data_fingerprint": recipe.data.source.fingerprint(),
    }
    minimal_record(name="two", **values).write(Path("out/two"))
    Path("out/two/model").mkdir()
    assert submit("two.yaml").stdout == "nothing left to submit\n"
    result = submit("two.yaml", key)
    assert "submitted job" in result.stdout
    assert "1 run with a result is submitted again" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing.yaml"], 14, "nothing.yaml"),
        (["one.yaml", "--accelerate", "zero9"], 14, "there is no accelerate config 'zero9'; did you mean 'zero"),
        (["one.yaml", "--nodes", "2"], 90, "--nodes needs several processes; give --accelerate"),
        (["one.yaml", "slurm.partiton=x"], 90, "did you mean 'partition'? (allowed: account, "),
        (["one.yaml", "slurm.array=1"], 90, "slurm.array is set by peftbench itself: the array has one task per run"),
        (["one.yaml", "--gpus-per-node", "a100:x"], 90, "slurm.gpus-per-node=a100:x is not a number of GPUs"),
        (
            ["one.yaml", "--gpus-per-node", "1", "slurm.gres=gpu:1"],
            90,
            "--gpus-per-node and slurm.gres both request",
        ),
        (["one.yaml", "slurm.gpus=1", "slurm.gres=gpu:1"], 90, "both request GPUs; give one of them"),
        (["one.yaml", "slurm.prologue=a\x07"], 90, "has a control character"),
        (["one.yaml", "slurm.time=2"], 91, "the job is stopped 120 s before its time limit"),
        (
            ["one.yaml", "slurm.signal=TERM@9"],
            90,
            "does not handle slurm.signal='TERM@9'; give B:USR1@SECONDS",
        ),
        (["one.yaml", "--out", "a\nb"], 90, "has a control character, which a batch script cannot contain"),
    ],
)
def test_invalid_input_is_refused(arguments: list[str], code: int, message: str, submit: Submit) -> None:
    """Each error is one sentence with its exit code, and no file is written."""
    before = sorted(Path().rglob("*"))
    result = submit(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("sbatch", "message"),
    [(None, "no sbatch on this machine"), ("echo invalid partition >&2; exit 1", "sbatch refused")],
)
def test_script_is_kept_if_sbatch_fails(
    sbatch: str | None, message: str, submit: Submit, slurm: Callable[..., Path]
) -> None:
    """If sbatch was not found or fails, the script still exists."""
    if sbatch is not None:
        slurm(sbatch=sbatch)
    result = submit("one.yaml")
    assert result.exit_code == 90
    assert message in result.stderr
    assert Path("out/one/job.sbatch").is_file()
    assert read_job_file(Path("out/one")) is None


def test_failing_squeue_is_an_error(submit: Submit, slurm: Callable[..., Path], tmp_path: Path) -> None:
    """Nothing is submitted, because a run could already be queued; ``status`` uses only the files."""
    slurm()
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho down >&2; exit 1\n", encoding="utf-8")
    result = submit("one.yaml")
    assert result.exit_code == 90
    assert "squeue failed (down); try again later" in result.stderr
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "recipe.yaml").write_text("name: one\n", encoding="utf-8")
    status = CliRunner().invoke(app, ["status", str(tmp_path / "runs")])
    assert status.exit_code == 0
    assert "warning: squeue failed (down); states of runs are read from their folders only" in status.stderr


def test_engine_configs_are_copied(submit: Submit) -> None:
    """The copies have the job's number of processes; ``--accelerate`` also accepts the path of a file."""
    result = submit("one.yaml", "--accelerate", "zero2", "--nodes", "3", "--gpus-per-node", "4", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "#SBATCH --nodes=3\n" in result.stdout
    folder = Path("out/one").resolve()
    engine = yaml.safe_load((folder / "accelerate.yaml").read_text(encoding="utf-8"))
    assert (engine["num_machines"], engine["num_processes"], engine["same_network"]) == (3, 12, False)
    assert engine["deepspeed_config"]["deepspeed_config_file"] == str(folder / "deepspeed.json")
    assert (folder / "deepspeed.json").read_text() == (REPOSITORY / "ds_configs" / "zero2.json").read_text()
    (folder / "mine.yaml").write_text("num_processes: many\n", encoding="utf-8")
    result = submit("one.yaml", "--accelerate", str(folder / "mine.yaml"))
    assert result.exit_code == 90
    assert "must be whole numbers" in result.stderr


def test_script_uses_this_python(submit: Submit) -> None:
    """The script contains the path of the current interpreter and is valid bash."""
    text = submit("one.yaml", "--dry-run").stdout
    assert subprocess.run(["/bin/bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert sys.executable in text
