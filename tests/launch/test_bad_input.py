"""Invalid input ends with one sentence and its exit code, and leaves no files."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from typer.testing import CliRunner

from peftbench.errors import (
    DataError,
    DataNotFoundError,
    DiskFullError,
    EmptySplitError,
    HubUnreachableError,
    MissingColumnError,
    MissingFileError,
    ModelNotFoundError,
    OutOfRangeError,
    OutputError,
    PeftbenchError,
    PrecisionError,
    RecipeError,
    SequenceTooShortError,
    TargetModulesError,
    UnknownKeyError,
    WrongTypeError,
)
from peftbench.train import app
from tests.helpers.disks import mount_tmpfs

Launch = Callable[..., subprocess.CompletedProcess[str]]
Mistake = tuple[str, type[PeftbenchError], str]

# Refused before torch is imported: arguments, error class, part of the message.
EARLY: list[Mistake] = [
    ("train.gobal_batch_size=4", UnknownKeyError, "did you mean 'train.global_batch_size'?"),
    ("method.kind=lorra", UnknownKeyError, "did you mean 'lora'?"),
    ("train.steps=ten", WrongTypeError, "train.steps='ten'"),
    ("train.steps=0", OutOfRangeError, "train.steps=0 must be greater than 0"),
    ("train.epochs=1", OutOfRangeError, "exactly one of train.steps and train.epochs"),
    ("task={kind: summarization, separator: 'TL;DR: '}", OutOfRangeError, "does not end in a space"),
    ("--config nothing.yaml", MissingFileError, "nothing.yaml"),
    ("--config rows.jsonl", RecipeError, "rows.jsonl is not valid YAML"),
    ("steps", RecipeError, "'steps'"),
]
# Refused when the data is read: the lead baseline needs examples but no model.
DATA: list[Mistake] = [
    ("data.source.test=empty.jsonl", EmptySplitError, "empty.jsonl"),
    (
        "task={kind: summarization, summary: sumary}",
        MissingColumnError,
        "has no column 'sumary'; did you mean 'summary'?",
    ),
    ("data.source.kind=hub", HubUnreachableError, "the Hub did not answer for abisee/cnn_dailymail"),
]
MORE_DATA: list[Mistake] = [
    ("data.source.test=nothing.jsonl", DataNotFoundError, "data.source.test='nothing.jsonl' does not exist"),
    ("data.source.test=broken.jsonl", DataError, "broken.jsonl cannot be read as json"),
    ("data.test=9", EmptySplitError, "data.test=9 is more than the 8 examples of the test split"),
]
# Refused when the model is loaded and adapted.
MODEL: list[Mistake] = [
    ("model.path=./no/such/base", ModelNotFoundError, "folder './no/such/base' does not exist"),
    ("data.max_length=16", SequenceTooShortError, "8 of 8 examples of the test split do not fit 16 tokens"),
    (
        "method.target_modules=[c_atn]",
        TargetModulesError,
        "'c_atn' matches no module of the model (architecture gpt2)",
    ),
]
MORE_MODEL: list[Mistake] = [
    ("model.path=no-such-base", HubUnreachableError, "the Hub did not answer for the config of 'no-such-base'"),
    ("train.precision=fp16", PrecisionError, "train.precision=fp16 needs a GPU"),
]


def cases(quick: list[Mistake], more: list[Mistake] | None = None) -> list[ParameterSet]:
    """Return a test's parameters, all marked slow: each starts a process that imports torch."""
    return [
        *(pytest.param(*mistake, id=mistake[0], marks=pytest.mark.slow) for mistake in [*quick, *(more or [])]),
    ]


def check(done: subprocess.CompletedProcess[str], kind: type[PeftbenchError], sentence: str) -> None:
    """Check the exit code, the one sentence on stderr and the one line of JSON on stdout."""
    assert done.returncode == kind.exit_code, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert done.stderr == errors[0] + "\n", "stderr has more than the error"
    last = json.loads(done.stdout.splitlines()[-1])
    assert last == {"outcome": "refused", "error": errors[0].removeprefix("error: "), "exit_code": kind.exit_code}


def test_mistakes_cover_many_error_classes() -> None:
    """The lists of mistakes are not empty, and they have at least eleven classes of error."""
    assert len(EARLY) >= 9
    assert len(DATA) >= 3
    assert len(MODEL) >= 3
    assert len({kind for _, kind, _ in EARLY + DATA + MODEL}) >= 11


@pytest.mark.parametrize(("arguments", "kind", "sentence"), EARLY, ids=[mistake[0] for mistake in EARLY])
def test_invalid_recipe_is_refused(
    arguments: str, kind: type[PeftbenchError], sentence: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is one sentence, and no run folder is created."""
    monkeypatch.chdir(project)
    options = arguments.split(" ") if arguments.startswith("--") else ["--config", "recipe.yaml", arguments]
    result = CliRunner().invoke(app, options)
    check(subprocess.CompletedProcess(options, result.exit_code, result.stdout, result.stderr), kind, sentence)
    assert not (project / "out").exists()


def test_launched_process_refuses_bad_input(launch: Launch, project: Path) -> None:
    """The entry point prints the same sentence and JSON in a process of its own."""
    (project / "empty.jsonl").write_text("", encoding="utf-8")
    check(
        launch("--config", "recipe.yaml", "method.kind=lead", "data.source.test=empty.jsonl"), EmptySplitError, "empty"
    )
    assert not (project / "out").exists()


@pytest.mark.parametrize(("override", "kind", "sentence"), cases(DATA, MORE_DATA))
def test_unusable_data_is_refused(
    override: str, kind: type[PeftbenchError], sentence: str, launch: Launch, project: Path
) -> None:
    """Missing, empty or broken files and wrong columns are refused, and no run folder is left."""
    (project / "empty.jsonl").write_text("", encoding="utf-8")
    (project / "broken.jsonl").write_text('{"article": "a", "summary": "b"}\n{"article": \n', encoding="utf-8")
    check(launch("--config", "recipe.yaml", "method.kind=lead", override), kind, sentence)
    assert not (project / "out").exists()


@pytest.mark.parametrize(("override", "kind", "sentence"), cases(MODEL, MORE_MODEL))
def test_unusable_model_is_refused(
    override: str, kind: type[PeftbenchError], sentence: str, launch: Launch, project: Path
) -> None:
    """An invalid model, length, target module or precision is refused, and no run folder is left."""
    check(launch("--config", "recipe.yaml", override), kind, sentence)
    assert not (project / "out").exists()


@pytest.mark.slow
def test_output_folder_below_a_file_is_refused(launch: Launch, project: Path) -> None:
    """The error comes before training, and the file is unchanged."""
    check(launch("--config", "recipe.yaml", "output_dir=rows.jsonl"), OutputError, "cannot write rows.jsonl/run: ")
    assert (project / "rows.jsonl").read_text(encoding="utf-8").startswith("{")


@pytest.mark.slow
def test_output_folder_on_a_read_only_disk_is_refused(launch: Launch, project: Path) -> None:
    """The error comes before training."""
    with mount_tmpfs(project / "disk", "ro"):
        done = launch("--config", "recipe.yaml", "output_dir=disk")
        check(done, OutputError, "cannot write disk/run: Read-only file system")


@pytest.mark.slow
def test_disk_too_small_for_the_record_is_an_error(launch: Launch, project: Path) -> None:
    """The error reports a full disk, and no partial record or empty folder remains."""
    with mount_tmpfs(project / "disk", "size=4k") as disk:
        done = launch("--config", "recipe.yaml", "output_dir=disk", "method.kind=lead")
        check(done, DiskFullError, "the disk is full: disk/run/record.json could not be written")
        assert list(disk.iterdir()) == []


@pytest.mark.slow
def test_disk_too_small_for_the_model_keeps_the_record(launch: Launch, project: Path) -> None:
    """The error reports a full disk, no partial model remains, and the record is complete."""
    with mount_tmpfs(project / "disk", "size=64k") as disk:
        done = launch("--config", "recipe.yaml", "output_dir=disk", "method.r=64")
        assert done.returncode == DiskFullError.exit_code
        (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert sentence.startswith("error: the disk is full: disk/run/model could not be written")
        last = json.loads(done.stdout.splitlines()[-1])
        assert (last["outcome"], last["record"]) == ("failed", "disk/run/record.json")
        assert {path.name for path in disk.rglob("*.*")} == {".lock", "record.json", "status.json"}
        record = json.loads((disk / "run" / "record.json").read_text(encoding="utf-8"))
        assert (record["outcome"]["kind"], record["outcome"]["phase"]) == ("failed", "save")
        assert len(record["step_losses"]) == 1
        assert record["quality"]["loss"] > 0


@pytest.mark.slow
def test_refused_run_keeps_an_existing_record(launch: Launch, project: Path) -> None:
    """A refused run deletes only the folders that it created."""
    existing = project / "out" / "run" / "record.json"
    existing.parent.mkdir(parents=True)
    existing.write_text("an earlier record", encoding="utf-8")
    check(launch("--config", "recipe.yaml", "train.precision=fp16"), PrecisionError, "fp16 needs a GPU")
    assert existing.read_text(encoding="utf-8") == "an earlier record"


@pytest.mark.slow
def test_unreachable_hub_is_an_error(launch: Launch, project: Path) -> None:
    """If the Hub refuses every connection, the error is the same as in offline mode."""
    # Nothing listens on port 9 (discard), so each retry of the library is refused at once.
    unreachable = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = launch("--config", "recipe.yaml", "method.kind=lead", "data.source.kind=hub", env=unreachable)
    check(done, HubUnreachableError, "the Hub did not answer for abisee/cnn_dailymail")
    done = launch("--config", "recipe.yaml", "model.path=no-such-base", env=unreachable)
    check(done, HubUnreachableError, "the Hub did not answer for the config of 'no-such-base'")
    assert not (project / "out").exists()
