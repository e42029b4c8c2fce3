"""Two suites side by side, as the command shows them: words, exit codes, refusals."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from peftbench.cli.app import app
from peftbench.errors import REGRESSION_EXIT_CODE, OutOfRangeError, PeftbenchError, UnknownKeyError, WrongTypeError
from peftbench.record import RECORD_FILE, read_record
from peftbench.report.diff.compute import SuiteDiff, diff_suites
from peftbench.report.diff.metrics import parse_thresholds
from peftbench.report.diff.render import print_diff, regression_summary
from tests.helpers.paths import REPOSITORY
from tests.unit.report.sides import printed, run, scored, suite

DEMO = REPOSITORY / "docs" / "results" / "demo"


@pytest.mark.parametrize(
    ("words", "kind", "sentence"),
    [
        (["rogueL=2%"], UnknownKeyError, "did you mean 'rougeL'?"),
        (["outcome=2%"], UnknownKeyError, "unknown metric 'outcome'"),
        (["=2%"], UnknownKeyError, "unknown metric ''"),
        (["five"], WrongTypeError, "'five' is not a threshold; give a nonnegative percentage, e.g. 5% or rougeL=2%"),
        (["rougeL="], WrongTypeError, "'rougeL=' is not a threshold"),
        (["rougeL=-2%"], WrongTypeError, "is not a threshold"),
        (["nan"], WrongTypeError, "is not a threshold"),
        (["1e999999999"], WrongTypeError, "is not a threshold"),
        (["5 %%"], WrongTypeError, "is not a threshold"),
        (["0.05"], WrongTypeError, "'0.05' is ambiguous; write 5% or 0.05%"),
        (["5%", "6%"], OutOfRangeError, "--threshold is given twice for all metrics"),
        (["mfu=5%", "mfu=6%"], OutOfRangeError, "--threshold is given twice for mfu"),
    ],
)
def test_a_threshold_that_cannot_be_meant(words: list[str], kind: type[PeftbenchError], sentence: str) -> None:
    """What is no percentage, and of no figure, is refused in one sentence."""
    with pytest.raises(kind, match=re.escape(sentence)) as refused:
        parse_thresholds(words)
    assert "\n" not in str(refused.value)


def test_nothing_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two equal suites have no table at all."""
    left = suite(tmp_path / "A", scored((1.0, 2.0), (1.0, 2.0), labelled=(1, 2)), run("b"))
    found = diff_suites(left, shutil.copytree(left, tmp_path / "B"))
    assert not found.changed
    assert not found.regressed
    assert printed(found, capsys).splitlines()[2:] == ["nothing changed"]


def test_hostile_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither markup nor HTML nor pipes are taken for what they seem, and nothing moves the terminal's cursor."""
    names = ["[red]a[/red]", "<script>b", "c | d", ":boom:", "e\x1b[2J\nf\u202e"]
    left = suite(tmp_path / "A[bold]", *(run(name, library_versions={"torch": name}) for name in names))
    right = suite(tmp_path / "B", *(run(name, library_versions={"torch": "[/]"}, peak=2000) for name in names))
    found = diff_suites(left, right)
    console = Console(force_terminal=True, width=200, color_system="standard")
    print_diff(found, console)
    out = capsys.readouterr().out
    text = re.sub(r"\x1b\[[0-9;]*m", "", out)  # colours are the only sequences there are
    assert "\x1b" not in text
    shown = [*names[:-1], r"e\x1b[2J\nf\u202e"]
    assert all(text.count(name) >= 3 for name in shown)  # as a value, as a run of the change, and in the figures
    assert "[/]" in text
    assert "A[bold] (5 runs)" in text
    assert all(name in regression_summary(found) for name in shown)
    assert "\n" not in regression_summary(found)


def test_a_verdict_needs_no_colour_and_no_wide_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On 80 columns every line fits, and words alone say which figure fell and which gained."""
    left, right = suite(tmp_path / "A", run()), suite(tmp_path / "B", run(peak=2000, speed=5000.0))
    print_diff(diff_suites(left, right), Console(force_terminal=True, width=80, color_system=None))
    out = capsys.readouterr().out
    table = out.split("changed metrics")[1]
    assert max(map(len, table.splitlines())) <= 80
    assert "regressed by more than 5%" in table
    assert "improved by more than 5%" in table


def test_the_command_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    """REGRESSED where a figure fell and zero where none did; the figures as JSON where that is asked for."""
    left, right = suite(tmp_path / "A", run()), suite(tmp_path / "B", run(peak=1060))
    compare = ["compare", str(left), str(right)]
    done = CliRunner().invoke(app, compare)
    assert done.exit_code == REGRESSION_EXIT_CODE
    assert done.stderr == "regressed beyond the threshold: lora (train_peak_bytes +6%)\n"
    done = CliRunner().invoke(app, [*compare, "--threshold", "train_peak_bytes=6%"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.endswith("no metric regressed beyond its threshold\n")
    done = CliRunner().invoke(app, [*compare, "--json"])
    assert done.exit_code == REGRESSION_EXIT_CODE
    assert SuiteDiff.model_validate_json(done.stdout) == diff_suites(left, right)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ("report", 2, "Missing argument 'FOLDER'"),
        ("report A --compare A A", 2, "--compare is now the command peftbench compare A B"),
        ("report A --json", 2, "--json is now an option of peftbench compare A B"),
        ("compare A A --threshold rogueL=5", 11, "did you mean 'rougeL'?"),
        ("compare A A --threshold many", 12, "'many' is not a threshold"),
        ("compare A nowhere", 60, "No record.json below nowhere"),
        ("compare nowhere A", 60, "No record.json below nowhere"),
        ("compare A", 2, "Missing argument 'B'"),
    ],
)
def test_a_command_that_cannot_be_meant(
    arguments: str, code: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not go together, and what is not there, is refused in one sentence; nothing is written."""
    suite(tmp_path / "A", run())
    monkeypatch.chdir(tmp_path)
    there = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, arguments.split())
    assert done.exit_code == code, done.output
    assert sentence in done.stderr
    assert not done.stdout
    assert sorted(tmp_path.rglob("*")) == there


def test_the_demo_and_a_changed_copy(tmp_path: Path) -> None:
    """The whole command, on shipped records: exit code, what goes to standard output, and what to standard error."""
    copy = shutil.copytree(DEMO, tmp_path / "after")
    old = read_record(copy / "lora" / RECORD_FILE)
    assert old.quality is not None
    assert old.quality.loss is not None
    old.model_copy(
        update={
            "recipe": old.recipe | {"method": old.recipe["method"] | {"r": 99}},
            "quality": old.quality.model_copy(update={"loss": old.quality.loss * 1.1}),
        }
    ).write(copy / "lora")
    shutil.rmtree(copy / "full")

    def compared(*sides: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from peftbench.cli.app import main; main()", "compare"]
        return subprocess.run([*command, *map(str, sides)], capture_output=True, text=True, check=False, timeout=120)

    same = compared(DEMO, DEMO)
    assert (same.returncode, same.stderr) == (0, "")
    assert same.stdout.splitlines()[-1] == "nothing changed"
    worse = compared(DEMO, copy)
    assert worse.returncode == REGRESSION_EXIT_CODE
    assert worse.stderr == (
        "regressed beyond the threshold: lora (held_out_loss +10%, not significant), full (missing in B)\n"
    )
    lines = [" ".join(line.split()) for line in worse.stdout.splitlines()]
    assert f"method.r {old.recipe['method']['r']} 99 lora" in lines
    assert any(line.startswith("lora held_out_loss") and "regressed by more than 5%" in line for line in lines)
    assert "full regressed: run is missing in B" in lines


def test_a_comparison_needs_no_torch(tmp_path: Path) -> None:
    """Neither reading, nor drawing intervals, nor printing brings in torch or a library of models."""
    sides = suite(tmp_path / "A", scored((1.0, 2.0))), suite(tmp_path / "B", scored((2.0, 5.0)))
    code = (
        "import sys; from peftbench.cli.app import app; app(standalone_mode=False); "
        "sys.exit(bool({'torch', 'transformers', 'accelerate', 'datasets', 'peft'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "compare", *map(str, sides)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "+133% (" in done.stdout
