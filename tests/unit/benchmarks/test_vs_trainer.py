"""HF Trainer, TRL and peftbench on a tiny GPT-2: equal training, and the table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftbench import shipped
from tests.helpers.paths import REPOSITORY

FOLDER = REPOSITORY / "benchmarks" / "vs_trainer"
ARMS = ("hf_study", "hf_best", "trl_default", "trl_best", "peftbench")
CASES = ("full", "lora", "prompt_tuning", "last_layer", "last_layer_epoch2")
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
ABSENT = (
    "evaluate",
    "deepspeed",
    "bitsandbytes",
    "nltk",
    "omegaconf",
    "rouge_score",
    "scipy",
    "tabulate",
    "rich",
    "typer",
    "pynvml",
)
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 64}


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Return the options for a data folder of short articles and a model folder without weights."""
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    model.mkdir()
    text = "the river rose again last night and the town by the bridge had to be left"
    tokens = text.split()
    rows = [
        {"article": " ".join(tokens[: 3 + i % 12]), "highlights": " ".join(tokens[i % 5 : i % 5 + 2 + i % 7])}
        for i in range(40)
    ]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for file in Path(shipped.SHIPPED_MODEL_DIR).glob("*.json"):
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) | TINY
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return ["--data", str(data), "--model", str(model)]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark on one core of the CPU."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def read_measurements(folder: Path) -> dict[tuple[str, str], dict[str, object]]:
    """Return records by case and arm."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.rglob("*.json")]
    return {(record["case"], record["arm"]): record for record in records}


SMALL = (
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--repeats",
    "1",
    "--threads",
    "1",
    "--num-virtual-tokens",
    "4",
    "--warmup",
    "1",
    "--steps",
    "2",
    "--learning-rate",
    "0.01",
)


def assert_arms_agree(records: dict[tuple[str, str], dict[str, object]], case: str, arms: tuple[str, ...]) -> None:
    """Check that all arms of a case have equal tokens and losses."""
    reference = records[case, "peftbench"]
    losses = reference["losses"]
    assert isinstance(losses, list)
    if case == "full":  # its steps are large compared with the differences between batches
        assert losses[-1] < losses[0] - 0.01
    for arm in arms:
        other = records[case, arm]
        for key in ("real_tokens", "labeled_tokens", "trainable_parameters", "model_flops", "data_fingerprint"):
            assert other[key] == reference[key], (case, arm, key)
        # TRL's default always multiplies in bf16, so its tolerance is larger.
        assert other["losses"] == pytest.approx(losses, rel=1e-3 if arm == "trl_default" else 1e-5), (case, arm)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_arms_have_equal_losses(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF Trainer's best flags and peftbench have equal losses in fp32; a second call prints a table without measuring.

    The first call cannot import optional libraries, so it prints no table.
    """
    out, hidden = tmp_path / "records", tmp_path / "hidden"
    hidden.mkdir()
    hide = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))"
    (hidden / "sitecustomize.py").write_text(hide, encoding="utf-8")
    arguments = [*options, *SMALL, "--methods", "full", "--arms", "hf_best", "peftbench", "--out", str(out)]
    with monkeypatch.context() as without_libraries:
        without_libraries.setenv("PYTHONPATH", str(hidden), prepend=":")
        first = call(*arguments)
    assert first.returncode == 0, first.stderr
    assert "no table: tabulate is not installed" in first.stderr
    modification_times = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    done = call(*arguments)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.json")} == modification_times
    records = read_measurements(out)
    assert_arms_agree(records, "full", ("hf_best",))
    text = json.dumps(records["full", "hf_best"]) + json.dumps(records["full", "peftbench"])
    assert str(tmp_path) not in text  # no path of this machine
    lines = [line for line in done.stdout.splitlines() if line.startswith("| full")]
    assert ["HF Trainer, its best flags" in lines[0], "peftbench" in lines[1]] == [True, True]
    assert "NOT COMPARABLE" not in done.stdout


@needs_trl
@pytest.mark.slow  # 25 processes, one after another
@pytest.mark.timeout(1500)
def test_all_arms_have_equal_losses_with_every_method(options: list[str], tmp_path: Path) -> None:
    """Losses, tokens and model FLOPs are equal for five arms, four methods, and the second epoch of one method."""
    out = tmp_path / "records"
    done = call(*options, *SMALL, "--out", str(out))
    assert done.returncode == 0, done.stderr
    records = read_measurements(out)
    assert set(records) == {(case, arm) for case in CASES for arm in ARMS}
    for case in CASES:
        assert_arms_agree(records, case, ARMS)
    for record in records.values():
        hardware_flops, model_flops = record["hardware_flops"], record["model_flops"]
        assert isinstance(hardware_flops, int)
        assert isinstance(model_flops, int)
        assert 0 < model_flops <= hardware_flops, (record["case"], record["arm"])
    notes = json.dumps(records["last_layer_epoch2", "peftbench"]["notes"])
    assert "hidden states" in notes
    assert ": 0 of " in notes  # nothing cached by another arm or repeat
    assert str(Path.home()) not in notes
    real_tokens = records["last_layer_epoch2", "peftbench"]["real_tokens"]
    assert isinstance(real_tokens, list)
    assert sum(real_tokens[:2]) == sum(real_tokens[2:])  # two steps an epoch, over the same examples
    methods, targets = done.stdout.split("\n\n")[:2]
    assert methods.count("\n| ") == 1 + len(CASES) * len(ARMS)  # a header and a line per measurement
    assert targets.count("\n| ") == 2 * (len(CASES) + 1)


def record(arm: str, repeat: int, **changes: object) -> dict[str, object]:
    """Return a record with round numbers."""
    return {
        "case": "full",
        "arm": arm,
        "repeat": repeat,
        "spec": {},
        "settings": {},
        "notes": [],
        "started_at": "now",
        "device_kind": "cpu",
        "device_name": "a CPU",
        "threads": 1,
        "versions": {"torch": "2"},
        "git": "abc",
        "data_fingerprint": "d",
        "model_fingerprint": "m",
        "trainable_parameters": 10,
        "untimed_steps": 1,
        "losses": [3.0, 2.0],
        "step_seconds": [1.0],
        "train_seconds": 2.0,
        "real_tokens": [50, 100],
        "labeled_tokens": [5, 10],
        "memory": {"rss_bytes": 3 * 2**20, "baseline_rss_bytes": 2**20},
        "counted_step": 1,
        "model_flops": 50,
        "hardware_flops": 100,
    } | changes


def write_records(folder: Path, *records: dict[str, object]) -> Path:
    """Write records to a folder and return it."""
    for entry in records:
        path = folder / str(entry["case"]) / f"{entry['arm']}-{entry['repeat']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entry), encoding="utf-8")
    return folder


def test_ratio_compares_records_of_one_repeat(tmp_path: Path) -> None:
    """The table and the block in a file have median and range of the ratios per repeat, not the ratio of medians."""
    folder = write_records(
        tmp_path / "records",
        *(record("hf_best", repeat, train_seconds=seconds) for repeat, seconds in ((1, 8.0), (2, 2.0), (3, 12.0))),
        *(record("peftbench", repeat, train_seconds=seconds) for repeat, seconds in ((1, 2.0), (2, 1.0), (3, 4.0))),
    )
    done = call("--report", str(folder))
    assert done.returncode == 0, done.stderr
    other, peftbench = (line for line in done.stdout.splitlines() if line.startswith("| full"))
    assert [cell.strip() for cell in other.split("|")[3:-1]] == [
        "12",
        "3.00x (2.00–4.00)",
        "2",
        "1.00x (1.00–1.00)",
        "50.0%",
        "0.0e+00",
    ]
    assert [cell.strip() for cell in peftbench.split("|")[3:-1]] == ["50", "–", "2", "–", "50.0%", "–"]
    page = tmp_path / "README.md"
    page.write_text("above\n<!-- report:x -->\nold\n<!-- end of report:x -->\nbelow\n", encoding="utf-8")
    assert call("--report", str(folder), "--update-file", str(page), "--marker", "x").returncode == 0
    assert page.read_text(encoding="utf-8").startswith("above\n<!-- report:x -->\n\n| method")
    assert "3.00x (2.00–4.00)" in page.read_text(encoding="utf-8")


def test_schema_1_record_reports_the_same_table(tmp_path: Path) -> None:
    """A record with the keys of schema 1 yields the same table as one with the new keys."""
    new = [record(arm, 1, spec={"num_virtual_tokens": 4}) for arm in ("hf_best", "peftbench")]
    text = json.dumps(new)
    for new_key, old_key in {
        "data_fingerprint": "data_identity",
        "model_fingerprint": "model_identity",
        "model_flops": "required_flops",
        "hardware_flops": "executed_flops",
        "untimed_steps": "warmup_steps",
        "num_virtual_tokens": "soft_tokens",
        "baseline_rss_bytes": "resident_baseline_bytes",
        "rss_bytes": "resident_bytes",
    }.items():
        text = text.replace(f'"{new_key}"', f'"{old_key}"')
    old = [entry | {"schema_version": 1} for entry in json.loads(text)]
    expected, reported = (
        call("--report", str(write_records(tmp_path / name, *entries)))
        for name, entries in (("new", new), ("old", old))
    )
    assert reported.returncode == 0, reported.stderr
    assert reported.stdout == expected.stdout


def test_targets_use_unrounded_medians(tmp_path: Path) -> None:
    """Targets compare speed and memory with the study's arm and the best other arm, before rounding."""
    mib = 2**20

    def measured_in(case: str, arm: str, seconds: float, peak: int) -> dict[str, object]:
        memory = {"rss_bytes": (100 + peak) * mib, "baseline_rss_bytes": 100 * mib}
        return record(arm, 1, case=case, train_seconds=seconds, memory=memory)

    folder = write_records(
        tmp_path / "records",
        *(
            measured_in("full", arm, *values)
            for arm, values in {
                "hf_study": (10.0, 100),
                "hf_best": (7.0, 5),
                "trl_best": (5.58, 60),
                "peftbench": (4.0, 45),
            }.items()
        ),
        *(
            measured_in("last_layer_epoch2", arm, *values)
            for arm, values in {
                "hf_best": (12.0, 1),
                "peftbench": (1.0, 1),
            }.items()
        ),
    )
    done = call("--report", str(folder))
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.split("\n\n")[1].splitlines()[2:]]
    study, best = "HF Trainer as the study ran it", "the best other arm: TRL SFTTrainer, its best settings"
    later = "speed, last layer, from the second epoch on"
    assert rows == [
        ["speed, full", study, "at least 2.50x", "2.50x", "yes"],
        ["speed, full", best, "at least 1.40x", "1.40x", "no"],  # 1.395 is displayed as 1.40 but is less
        [later, study, "at least 20.00x", "–", "–"],
        [later, "the best other arm: HF Trainer, its best flags", "at least 12.00x", "12.00x", "yes"],
        ["peak memory, full", study, "at most 0.45x", "0.45x", "yes"],
        ["peak memory, full", best, "at most 0.70x", "0.75x", "no"],
    ]


@pytest.mark.slow  # a training process
def test_all_arms_have_one_memory_baseline(options: list[str], tmp_path: Path) -> None:
    """The peak of peftbench's arm includes the loaded examples, although its own baseline is measured later."""
    base, ballast_bytes = tmp_path / "base", 256 * 2**20
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(FOLDER)!r})
import arm
from spec import Job, Spec
arm.prepare(Path({options[3]!r}), Path({str(base)!r}), 0)
read = arm.read_examples
def heavy(*args):
    global ballast
    ballast = b"x" * {ballast_bytes}
    return read(*args)
arm.read_examples = heavy
spec = Spec(precision="fp32", num_virtual_tokens=4, warmup=1, steps=1)
settings = dict(spec=spec, case="full", repeat=1, train={options[1] + "/train.jsonl"!r}, base={str(base)!r}, out="")
print(arm.measure(Job(arm="peftbench", **settings)).peak_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > ballast_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": [3.0, 2.1]}, "losses up to 5.000% from peftbench's, 0.100% is allowed"),
        pytest.param({"losses": [3.0, 2.003]}, "losses up to 0.150% from peftbench's", marks=pytest.mark.slow),
        ({"losses": [float("nan"), 2.0]}, "losses up to nan%"),
        ({"real_tokens": [49, 100]}, "its steps have other tokens than peftbench's"),
        pytest.param(
            {"labeled_tokens": [5, 11]}, "its steps have other tokens than peftbench's", marks=pytest.mark.slow
        ),
        ({"trainable_parameters": 11}, "it trains 11 parameters; peftbench trains others"),
        pytest.param({"model_flops": 51}, "its model FLOPs differ from peftbench's", marks=pytest.mark.slow),
        ({"device_name": "another"}, "the records have more than one device: a CPU, another"),
        pytest.param({"git": "def"}, "the records have more than one checkout: abc, def", marks=pytest.mark.slow),
    ],
)
def test_different_records_are_not_compared(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    """Differences are listed below the table, the exit code is 1, and no file is changed."""
    folder = write_records(tmp_path / "records", record("hf_best", 1, **changes), record("peftbench", 1))
    done = call("--report", str(folder))
    assert done.returncode == 1
    assert "NOT COMPARABLE: " in done.stdout
    assert message in done.stdout
    page = tmp_path / "README.md"
    page.write_text("<!-- report:vs_trainer -->\n<!-- end of report:vs_trainer -->", encoding="utf-8")
    before = page.read_text(encoding="utf-8")
    refused = call("--report", str(folder), "--update-file", str(page))
    assert refused.returncode == 60
    assert message in refused.stderr
    assert page.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "nowhere"], 14, "error: --data nowhere has no train.jsonl\n"),
        (["--model", "nowhere"], 14, "error: --model nowhere has no config.json\n"),
        (["--methods", "soup"], 13, "error: --methods soup is not one of full, lora, prompt_tuning"),
        (["--arms", "soup"], 13, "error: --arms soup is not one of hf_study"),
        (["--arms", "hf_best"], 13, "error: --arms must include peftbench"),
        (["--repeats", "0"], 13, "error: --repeats must be 1 or more\n"),
        (
            ["--device", "cpu", "--batch", "3", "--micro-batch", "2"],
            13,
            "batch 3 cannot be cut into micro-batches of 2",
        ),
        (["--device", "cpu", "--steps", "0"], 13, "error: --steps: "),
        (["--device", "cpu", "--together"], 13, "error: --together needs a GPU"),
        (["--report", "nowhere"], 60, "error: nowhere has no records"),
    ],
)
def test_invalid_options_are_refused(options: list[str], arguments: list[str], code: int, message: str) -> None:
    """Invalid options end with one sentence and an exit code before anything runs."""
    done = call(*options, *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_data_folder_is_required() -> None:
    """--data has no default."""
    done = call("--device", "cpu")
    assert done.returncode == 14
    assert done.stderr == "error: --data must name a folder with train.jsonl\n"


@pytest.mark.slow  # two processes
def test_too_few_examples_are_refused(options: list[str], tmp_path: Path) -> None:
    """An arm's error is printed and the command fails."""
    arguments = ["--arms", "peftbench", "--methods", "full", "--steps", "50", "--out", str(tmp_path / "records")]
    done = call(*options, *SMALL, *arguments)
    assert done.returncode == 1
    assert "has 40 usable examples, but 204 are needed; use fewer steps" in done.stderr
    assert "Traceback" not in done.stderr


def test_main_script_imports_no_cuda_library() -> None:
    """The process that starts the arms imports nothing that could allocate GPU memory."""
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(FOLDER)!r}); runpy.run_path({str(FOLDER / '__main__.py')!r}); "
        "sys.exit(bool({'torch', 'transformers', 'bitsandbytes', 'trl'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_arms_of_missing_trl_are_skipped(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without trl its arms are skipped with a message."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    hide = (
        "import importlib.util as u; found = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'trl' else found(name, *rest)"
    )
    (hidden / "sitecustomize.py").write_text(hide, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(hidden), prepend=":")
    done = call(*options, "--device", "cpu", "--minutes", "-1", "--out", str(tmp_path / "records"))
    assert "left out, since trl is not installed: trl_default, trl_best" in done.stderr
    assert "time is up; 45 measurements are left" in done.stdout


@pytest.mark.parametrize(
    ("records", "block"),
    [("cpu_bf16", "vs_trainer"), ("cpu_bf16_four", "vs_trainer_four"), ("cuda_bf16", "vs_trainer_gpu")],
)
def test_readme_blocks_match_committed_records(records: str, block: str, tmp_path: Path) -> None:
    """Regenerating a block from its records changes nothing."""
    page = tmp_path / "README.md"
    page.write_bytes((FOLDER / "README.md").read_bytes())
    done = call("--report", str(FOLDER / "records" / records), "--update-file", str(page), "--marker", block)
    assert done.returncode == 0, done.stderr
    assert page.read_bytes() == (FOLDER / "README.md").read_bytes()
