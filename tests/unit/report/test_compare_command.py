"""The compare command: printed text, exit codes and refused arguments."""

from __future__ import annotations

import json
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
from peftbench.report.diff.metrics import list_compared_metrics, parse_thresholds
from peftbench.report.diff.render import print_diff, regression_summary
from tests.helpers.paths import REPOSITORY
from tests.unit.report.suites import build_run, build_scored_run, capture_printed, write_suite

DEMO = REPOSITORY / "docs" / "results" / "demo"


@pytest.mark.parametrize(
    ("thresholds", "error_class", "message"),
    [
        (["rogueL=2%"], UnknownKeyError, "did you mean 'rougeL'?"),
        (["outcome=2%"], UnknownKeyError, "unknown metric 'outcome'"),
        (["=2%"], UnknownKeyError, "unknown metric ''"),
        (
            ["five"],
            WrongTypeError,
            "'five' is not a threshold; give a nonnegative percentage, e.g. 5% or held_out_loss=2%",
        ),
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
def test_invalid_threshold_is_refused(thresholds: list[str], error_class: type[PeftbenchError], message: str) -> None:
    """Refuse a threshold that is not a percentage or names an unknown metric, in a message of one line."""
    names = list_compared_metrics([build_run()])
    with pytest.raises(error_class, match=re.escape(message)) as error:
        parse_thresholds(thresholds).check_names(names)
    assert "\n" not in str(error.value)


def test_equal_suites_print_nothing_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Print no table if two suites are equal."""
    left = write_suite(tmp_path / "A", build_scored_run((1.0, 2.0), (1.0, 2.0), labeled=(1, 2)), build_run("b"))
    diff = diff_suites(left, shutil.copytree(left, tmp_path / "B"))
    assert not diff.changed
    assert not diff.regressed
    assert capture_printed(diff, capsys).splitlines()[2:] == ["nothing changed"]


def test_hostile_names_are_printed_literally(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Print markup, HTML and pipes as text, and escape control characters."""
    names = ["[red]a[/red]", "<script>b", "c | d", ":boom:", "e\x1b[2J\nf\u202e"]
    left = write_suite(tmp_path / "A[bold]", *(build_run(name, library_versions={"torch": name}) for name in names))
    right = write_suite(
        tmp_path / "B", *(build_run(name, library_versions={"torch": "[/]"}, peak=2000) for name in names)
    )
    diff = diff_suites(left, right)
    console = Console(force_terminal=True, width=200, color_system="standard")
    print_diff(diff, console)
    out = capsys.readouterr().out
    text = re.sub(r"\x1b\[[0-9;]*m", "", out)  # only color sequences are allowed
    assert "\x1b" not in text
    shown = [*names[:-1], r"e\x1b[2J\nf\u202e"]
    assert all(text.count(name) >= 3 for name in shown)  # as a value, as a run with the change, and in the metrics
    assert "[/]" in text
    assert "A[bold] (5 runs)" in text
    assert all(name in regression_summary(diff) for name in shown)
    assert "\n" not in regression_summary(diff)


def test_verdict_is_readable_in_80_columns_without_color(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that each line fits into 80 columns, and that text alone marks regressed and improved metrics."""
    left, right = (
        write_suite(tmp_path / "A", build_run()),
        write_suite(tmp_path / "B", build_run(peak=2000, speed=5000.0)),
    )
    print_diff(diff_suites(left, right), Console(force_terminal=True, width=80, color_system=None))
    out = capsys.readouterr().out
    table = out.split("changed metrics")[1]
    assert max(map(len, table.splitlines())) <= 80
    assert "regressed by more than 5%" in table
    assert "improved by more than 5%" in table


def test_regression_has_its_own_exit_code(tmp_path: Path) -> None:
    """Exit with REGRESSION_EXIT_CODE if a metric regressed, else with zero; --json prints the comparison as JSON."""
    left, right = write_suite(tmp_path / "A", build_run()), write_suite(tmp_path / "B", build_run(peak=1060))
    compare = ["compare", str(left), str(right)]
    result = CliRunner().invoke(app, compare)
    assert result.exit_code == REGRESSION_EXIT_CODE
    assert result.stderr == "regressed beyond the threshold: lora (train_peak_bytes +6%)\n"
    result = CliRunner().invoke(app, [*compare, "--threshold", "train_peak_bytes=6%"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith("no metric regressed beyond its threshold\n")
    result = CliRunner().invoke(app, [*compare, "--json"])
    assert result.exit_code == REGRESSION_EXIT_CODE
    assert SuiteDiff.model_validate_json(result.stdout) == diff_suites(left, right)


@pytest.mark.parametrize("side", ["A", "B"])
def test_unreadable_record_is_named(side: str, tmp_path: Path) -> None:
    """The other runs are compared; a run whose record is damaged afterwards is missing, which is a regression."""
    folders = [write_suite(tmp_path / name, build_run(), build_run("b")) for name in ("A", "B")]
    (tmp_path / side / "b" / RECORD_FILE).write_text("{", encoding="utf-8")
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["compare", *map(str, folders), "--html", str(page)])
    assert result.exit_code == (REGRESSION_EXIT_CODE if side == "B" else 0)
    sentence = f"not compared, in {side}: {tmp_path / side / 'b' / RECORD_FILE} is not a record of schema 3"
    assert sentence in result.stdout
    assert sentence in page.read_text(encoding="utf-8")
    answer = json.loads(CliRunner().invoke(app, ["compare", *map(str, folders), "--json"]).stdout)
    assert [len(answer[name]["unreadable"]) for name in ("before", "after")] == [int(side == "A"), int(side == "B")]
    for run in ("lora", "b"):
        (tmp_path / side / run / RECORD_FILE).write_text("{", encoding="utf-8")
    refused = CliRunner().invoke(app, ["compare", *map(str, folders)])
    assert (refused.exit_code, refused.stderr.count("\n")) == (60, 1)
    assert "no readable record.json below" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        ("report", 2, "report needs FOLDER"),
        ("report A --compare A A", 2, "--compare is now the command peftbench compare A B"),
        ("report A --json", 2, "--json is now an option of peftbench compare A B"),
        ("compare A A --threshold rogueL=5", 11, "did you mean 'rougeL'?"),
        ("compare A A --threshold many", 12, "'many' is not a threshold"),
        ("compare A nowhere", 60, "No record.json below nowhere"),
        ("compare nowhere A", 60, "No record.json below nowhere"),
        ("compare A", 2, "compare needs AFTER"),
    ],
)
def test_invalid_command_is_refused(
    arguments: str, exit_code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refuse invalid options and folders without records in one sentence, and write nothing."""
    write_suite(tmp_path / "A", build_run())
    monkeypatch.chdir(tmp_path)
    files_before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == exit_code, result.output
    assert message in result.stderr
    assert not result.stdout
    assert sorted(tmp_path.rglob("*")) == files_before


def test_changed_copy_of_the_demo_regresses(tmp_path: Path) -> None:
    """Run the command on shipped records; check its exit code, standard output and standard error."""
    changed_demo = shutil.copytree(DEMO, tmp_path / "after")
    old = read_record(changed_demo / "lora" / RECORD_FILE)
    assert old.quality is not None
    assert old.quality.loss is not None
    old.model_copy(
        update={
            "recipe": old.recipe | {"method": old.recipe["method"] | {"r": 99}},
            "quality": old.quality.model_copy(update={"loss": old.quality.loss * 1.1}),
        }
    ).write(changed_demo / "lora")
    shutil.rmtree(changed_demo / "full")

    def run_compare(*suites: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from peftbench.cli.app import main; main()", "compare"]
        return subprocess.run([*command, *map(str, suites)], capture_output=True, text=True, check=False, timeout=120)

    same = run_compare(DEMO, DEMO)
    assert (same.returncode, same.stderr) == (0, "")
    assert same.stdout.splitlines()[-1] == "nothing changed"
    worse = run_compare(DEMO, changed_demo)
    assert worse.returncode == REGRESSION_EXIT_CODE
    assert worse.stderr == (
        "regressed beyond the threshold: lora (held_out_loss +10%, not significant), full (missing in B)\n"
    )
    lines = [" ".join(line.split()) for line in worse.stdout.splitlines()]
    assert f"method.r {old.recipe['method']['r']} 99 lora" in lines
    assert any(line.startswith("lora held_out_loss") and "regressed by more than 5%" in line for line in lines)
    assert "full regressed: run is missing in B" in lines


def test_compare_imports_no_torch(tmp_path: Path) -> None:
    """Check that a comparison with intervals imports neither torch nor a model library."""
    suites = (
        write_suite(tmp_path / "A", build_scored_run((1.0, 2.0))),
        write_suite(tmp_path / "B", build_scored_run((2.0, 5.0))),
    )
    code = (
        "import sys; from peftbench.cli.app import app; app(standalone_mode=False); "
        "sys.exit(bool({'torch', 'transformers', 'accelerate', 'datasets', 'peft'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "compare", *map(str, suites)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "+133% (" in result.stdout
