"""Two suites side by side: known records before and after give exact changes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from peftbench.cli import app
from peftbench.errors import (
    REGRESSED,
    OutOfRangeError,
    PeftbenchError,
    RecordError,
    UnknownKeyError,
    WrongTypeError,
)
from peftbench.record import (
    FILE,
    ByExample,
    Compute,
    Device,
    Flops,
    Interval,
    Memory,
    Outcome,
    RunRecord,
    Throughput,
    TokensPerSecond,
    read_record,
)
from peftbench.report.beside import Beside, Figure, Pair, beside
from peftbench.report.beside_text import print_beside, regressed
from peftbench.report.figures import FIGURES, parse_thresholds
from peftbench.report.pairing import Change
from tests.report.records import record

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "docs" / "results" / "demo"


def suite(folder: Path, *records: RunRecord) -> Path:
    """``folder`` with these records, each in a folder named after its run, as far as a name can be one."""
    folder.mkdir(exist_ok=True)
    for one in records:
        one.write(folder / re.sub(r"\W", "_", one.name))
    return folder


def held(tmp_path: Path, before: RunRecord, after: RunRecord, *thresholds: str) -> Pair:
    """One run held against another."""
    sides = suite(tmp_path / "A", before), suite(tmp_path / "B", after)
    (pair,) = beside(*sides, parse_thresholds(thresholds)).pairs
    return pair


def figures(pair: Pair) -> dict[str, Figure]:
    """By name."""
    return {figure.name: figure for figure in pair.figures}


def run(name: str = "lora", **changes: Any) -> RunRecord:
    """A run with every figure known, of a recipe of its own."""
    speed = Throughput(
        steps=5, step_seconds_median=1, step_seconds_p10=1, step_seconds_p90=1, samples_per_second=1.0, data_share=0,
        tokens_per_second=TokensPerSecond(real=changes.pop("speed", 1000.0), padded=1, labelled=1, virtual=0),
    )  # fmt: skip
    values: dict[str, Any] = {
        "throughput": speed, "recipe_fingerprint": name, "energy_joules": 40.0,
        "memory": {"train": Memory(allocated_bytes=changes.pop("peak", 1000))},
        "flops": Flops(required=100, executed=200), "compute": Compute(required_per_second=1.0, peak_per_second=4.0),
    }  # fmt: skip
    return record(name, "lora", 10, **(values | changes))


def scored(
    rouge: tuple[float, ...],
    losses: tuple[float, ...] = (),
    *,
    identity: str = "same",
    labelled: tuple[int, ...] = (),
    loss: float = 3.25,
) -> RunRecord:
    """A run with each example's scores, whose means are as they must be."""
    made = run(loss=loss)
    assert made.quality is not None
    mean = sum(rouge) / len(rouge)
    quality = made.quality.model_copy(update={
        "rouge": {"rougeL": Interval(mean=mean, low=mean, high=mean)},
        "by_example": ByExample(identity=identity, loss=losses, labelled=labelled, rouge={"rougeL": rouge}),
    })  # fmt: skip
    return made.model_copy(update={"quality": quality})


def printed(found: Beside, capsys: pytest.CaptureFixture[str], console: Console | None = None) -> str:
    """What is printed, columns apart by one space."""
    print_beside(found, console)
    return "\n".join(" ".join(line.split()) for line in capsys.readouterr().out.splitlines())


def test_every_figure_has_its_exact_change(tmp_path: Path) -> None:
    """Each figure has its values before and after, its change as a share of what it was, and its verdict."""
    new = run(
        loss=3.3475, speed=1200.0, peak=1100, phase_seconds={"train": 12.0}, energy_joules=42.0,
        flops=Flops(required=100, executed=180), compute=Compute(required_per_second=0.5, peak_per_second=4.0),
    )  # fmt: skip
    found = figures(held(tmp_path, run(), new))
    told = {name: (f.before, f.after, f.change, f.verdict, f.fell) for name, f in found.items()}
    assert list(told) == ["outcome", *FIGURES]
    same = (31.25, 31.25, 0.0, "equal", False)
    assert told == {
        "outcome": ("ok", "ok", None, "equal", False),
        "held_out_loss": (3.25, 3.3475, 0.03, "within", False),
        "rouge1": same, "rouge2": same, "rougeL": same, "rougeLsum": same,
        "training_seconds": (12.5, 12.0, -0.04, "within", False),
        "tokens_per_second": (1000.0, 1200.0, 0.2, "gained", False),
        "train_peak_bytes": (1000, 1100, 0.1, "fell", True),
        "required_flops": (100, 100, 0.0, "equal", False),
        "executed_flops": (200, 180, -0.1, "gained", False),
        "mfu": (0.25, 0.125, -0.5, "fell", True),
        "training_joules": (40.0, 42.0, 0.05, "within", False),
    }  # fmt: skip
    assert {f.name for f in found.values() if f.better == "higher"} == {
        "rouge1", "rouge2", "rougeL", "rougeLsum", "tokens_per_second", "mfu",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "threshold", "verdict"),
    [
        ({"loss": 1.1}, {"loss": 1.155}, "5", "within"),  # a little more than 5 % in binary fractions
        ({"loss": 1.1}, {"loss": 1.1550001}, "5%", "fell"),
        ({"loss": 1.1}, {"loss": 1.045}, "5%", "within"),
        ({"loss": 1.1}, {"loss": 1.0449999}, "5%", "gained"),
        ({"speed": 1000.0}, {"speed": 900.0}, "10%", "within"),
        ({"speed": 1000.0}, {"speed": 899.9}, "10%", "fell"),
        ({"speed": 1000.0}, {"speed": 1100.1}, "10%", "gained"),
        ({"peak": 1000}, {"peak": 1025}, "2.5%", "within"),
        ({"peak": 1000}, {"peak": 1026}, "2.5%", "fell"),
        ({"peak": 1000}, {"peak": 974}, "2.5%", "gained"),
        ({"peak": 1000}, {"peak": 1001}, "0", "fell"),
        ({"peak": 1000}, {"peak": 1000}, "0%", "equal"),
        ({"peak": 0}, {"peak": 1}, "1000%", "fell"),
    ],
)
def test_a_figure_falls_beyond_its_threshold_and_not_at_it(
    before: dict[str, Any], after: dict[str, Any], threshold: str, verdict: str, tmp_path: Path
) -> None:
    """Exactly at the threshold is no fall, just beyond is one, whichever direction is good."""
    name = {"loss": "held_out_loss", "speed": "tokens_per_second", "peak": "train_peak_bytes"}[next(iter(before))]
    pair = held(tmp_path, run(**before), run(**after), f"{name}={threshold}")
    assert figures(pair)[name].verdict == verdict
    assert pair.fell == (verdict == "fell")


def test_a_threshold_of_one_figure_goes_before_that_of_all(tmp_path: Path) -> None:
    """The same change falls where its figure's own threshold says so, and not where it does not."""
    sides = run(loss=2.0, speed=100.0), run(loss=2.2, speed=90.0)
    strict, loose = ("held_out_loss=2%", "20%"), ("20", "tokens_per_second=9.99%")
    assert [f.name for f in held(tmp_path, *sides, *strict).figures if f.fell] == ["held_out_loss"]
    assert [f.name for f in held(tmp_path, *sides, *loose).figures if f.fell] == ["tokens_per_second"]
    assert parse_thresholds([]).of("rougeL") == parse_thresholds(["5%"]).of("mfu") == parse_thresholds(["5"]).default


@pytest.mark.parametrize(
    ("words", "kind", "sentence"),
    [
        (["rogueL=2%"], UnknownKeyError, "did you mean 'rougeL'?"),
        (["outcome=2%"], UnknownKeyError, "there is no figure 'outcome'"),
        (["=2%"], UnknownKeyError, "there is no figure ''"),
        (["five"], WrongTypeError, "'five' is no threshold; give a percentage of zero or more, as 5% or rougeL=2%"),
        (["rougeL="], WrongTypeError, "'rougeL=' is no threshold"),
        (["rougeL=-2%"], WrongTypeError, "is no threshold"),
        (["nan"], WrongTypeError, "is no threshold"),
        (["1e999999999"], WrongTypeError, "is no threshold"),
        (["5 %%"], WrongTypeError, "is no threshold"),
        (["0.05"], WrongTypeError, "'0.05' may mean 5% or 0.05%"),
        (["5%", "6%"], OutOfRangeError, "--threshold is given twice for all figures"),
        (["mfu=5%", "mfu=6%"], OutOfRangeError, "--threshold is given twice for mfu"),
    ],
)
def test_a_threshold_that_cannot_be_meant(words: list[str], kind: type[PeftbenchError], sentence: str) -> None:
    """What is no percentage, and of no figure, is refused in one sentence."""
    with pytest.raises(kind, match=re.escape(sentence)) as refused:
        parse_thresholds(words)
    assert "\n" not in str(refused.value)


def test_a_missing_run_falls_and_a_new_one_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is only before is missing, one that is only after is new."""
    left, right = suite(tmp_path / "A", run("kept"), run("gone")), suite(tmp_path / "B", run("kept"), run("come"))
    found = beside(left, right)
    assert [(pair.before, pair.after, pair.matched_by, pair.fell) for pair in found.pairs] == [
        ("gone", None, None, True), ("kept", "kept", "name", False), (None, "come", None, False),
    ]  # fmt: skip
    assert found.fell
    assert regressed(found) == "fell by more than allowed: gone (missing in B)"
    text = printed(found, capsys)
    assert "\ngone fell: missing in B\n" in text
    assert "\ncome new in B\n" in text
    shutil.rmtree(left / "gone")
    assert not beside(left, right).fell


def test_runs_are_matched_by_name_then_recipe_then_path(tmp_path: Path) -> None:
    """A renamed run is found by its recipe, a run of another recipe by its path, and what fits two by neither."""
    names = {"by_name": "1", "old": "2", "place": "3", "twin_1": "t", "twin_2": "t"}
    left = suite(tmp_path / "A", *(run(name, recipe_fingerprint=of) for name, of in names.items()))
    right = tmp_path / "B"
    places = {"elsewhere": ("by_name", "9"), "new": ("new", "2"), "place": ("other", "8"), "twin": ("twin", "t")}
    for place, (name, of) in places.items():
        run(name, recipe_fingerprint=of).write(right / place)
    found = beside(left, right)
    assert {(pair.label, pair.matched_by) for pair in found.pairs} == {
        ("by_name", "name"), ("old -> new", "recipe"), ("place -> other", "path"),
        ("twin_1", None), ("twin_2", None), ("twin", None),
    }  # fmt: skip


def test_two_folders_of_one_run_each_are_matched(tmp_path: Path) -> None:
    """The folders of two runs can be compared whatever the runs' names are."""
    run("a").write(tmp_path / "A")
    run("b").write(tmp_path / "B")
    assert [pair.label for pair in beside(tmp_path / "A", tmp_path / "B").pairs] == ["a -> b"]


def test_two_records_of_one_name_are_refused(tmp_path: Path) -> None:
    """A folder in which a name stands twice is told with both places."""
    left, right = suite(tmp_path / "A", run()), suite(tmp_path / "B", run())
    run().write(right / "again")
    sentence = f"{right} has two records of a run named 'lora', in again and lora; give a folder"
    with pytest.raises(RecordError, match=re.escape(sentence)):
        beside(left, right)
    with pytest.raises(RecordError, match=re.escape(sentence)):
        beside(right, left)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [("ok", "oom", "fell"), ("ok", "failed", "fell"), ("oom", "ok", "gained"), ("oom", "diverged", "changed"),
     ("oom", "oom", "equal")],
)  # fmt: skip
def test_an_outcome_is_a_figure(before: Any, after: Any, verdict: str, tmp_path: Path) -> None:
    """From ok to anything else is a fall, to ok a gain; what a run did before it failed is no figure of it."""
    pair = held(tmp_path, run(outcome=Outcome(kind=before)), run(outcome=Outcome(kind=after)))
    outcome, *others = pair.figures
    assert (outcome.before, outcome.after, outcome.verdict) == (before, after, verdict)
    assert pair.fell == (verdict == "fell")
    assert {f.verdict for f in others} == ({"lost"} if before == "ok" else {"new"} if after == "ok" else set())


def test_an_out_of_memory_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the outcome fell, it alone is shown: that the rest is gone goes without saying."""
    left, right = suite(tmp_path / "A", run()), suite(tmp_path / "B", run(outcome=Outcome(kind="oom", step=1)))
    found = beside(left, right)
    assert regressed(found) == "fell by more than allowed: lora (outcome ok, now oom)"
    text = printed(found, capsys)
    assert "lora outcome ok oom fell: a run that did not end well has no other figures" in text
    assert "train_peak_bytes" not in text


def test_a_figure_that_is_known_no_more_falls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A figure that was known and is not, or is no number any more, is said; unknown on both sides it is left out."""
    old = run(flops=Flops())
    left, right = suite(tmp_path / "A", old), suite(tmp_path / "B", run(loss=float("nan"), energy_joules=None))
    found = beside(left, right)
    told = figures(found.pairs[0])
    assert {name for name, figure in told.items() if figure.fell} == {"held_out_loss", "training_joules"}
    assert {name for name, figure in told.items() if figure.verdict == "new"} == {"required_flops", "executed_flops"}
    assert "lora held_out_loss 3.2500 unknown fell: not known any more" in printed(found, capsys)
    assert regressed(found).endswith("lora (held_out_loss not known any more; training_joules not known any more)")
    assert json.loads(found.model_dump_json())["pairs"][0]["figures"][1]["after"] is None
    assert "required_flops" not in figures(held(tmp_path, old, old))


def test_config_is_compared_knob_by_knob(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nested knobs, ones of one side, lists and what a run was made with are named; name and folder are not."""

    def made(name: str, recipe: dict[str, Any], **changes: Any) -> RunRecord:
        one = run(name, **changes)
        return one.model_copy(update={"recipe": one.recipe | recipe})

    source: dict[str, Any] = {"kind": "files", "options": {"columns": ["a", "b"], "strict": 1}}
    old = made("x", {"data": {"seed": 0, "source": source}, "save_model": False}, versions={"torch": "1", "peft": "3"})
    source = {"kind": "files", "options": {"columns": ["a", "c"], "strict": True}, "split": None}
    new = made(
        "x", {"data": {"seed": 0, "source": source}, "save_model": 0, "output_dir": "elsewhere"},
        versions={"torch": "2", "peft": "3"}, git="abc", data_identity="d",
    )  # fmt: skip
    pair = held(tmp_path, old, new)
    assert list(pair.config) == [
        Change(knob="data.source.options.columns", before=["a", "b"], after=["a", "c"]),
        Change(knob="data.source.options.strict", before=1, after=True),
        Change(knob="save_model", before=False, after=0),
        Change(knob="data.source.split", only_in="B"),
        Change(knob="versions.torch", before="1", after="2"),
        Change(knob="git", before=None, after="abc"),
        Change(knob="data_identity", before=None, after="d"),
    ]
    text = printed(beside(tmp_path / "A", tmp_path / "B"), capsys)
    assert 'data.source.options.columns ["a", "b"] ["a", "c"] all' in text
    assert "data.source.split not there null all" in text
    assert "no figure changed" in text


def test_what_changed_in_all_runs_is_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Changes that all runs share come first and once, others with the runs that have them."""
    left = suite(tmp_path / "A", *(run(name, versions={"torch": "1"}) for name in ("a", "b", "c")))
    right = suite(tmp_path / "B", *(
        run(name, versions={"torch": "2"}, global_batch=batch, seed=seed)
        for name, batch, seed in (("a", 16, 0), ("b", 32, 0), ("c", 32, 7))
    ))  # fmt: skip
    found = beside(left, right)
    assert [change.knob for change in found.common] == ["versions.torch"]
    table = printed(found, capsys).split("config")[1]
    assert re.findall(r"^(\S+ \S+ \S+ .+)$", table, re.MULTILINE)[1:4] == [
        "versions.torch 1 2 all", "train.global_batch 16 32 b, c", "train.seed 0 7 c",
    ]  # fmt: skip


def test_two_machines_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a device differs the top says so, and figures of time are compared all the same."""
    card = Device(kind="cuda", name="a GPU", processes=1)
    left, right = suite(tmp_path / "A", run()), suite(tmp_path / "B", run(device=card, speed=10.0))
    found = beside(left, right)
    assert found.two_machines
    assert figures(found.pairs[0])["tokens_per_second"].fell
    assert Change(knob="device.name", before="a CPU", after="a GPU") in found.common
    *_, line = printed(found, capsys).split("config")[0].splitlines()
    assert line == "times and memory are of two machines: A ran on a CPU (cpu), B on a GPU (cuda)"
    assert not beside(left, left).two_machines
    assert "two machines" not in printed(beside(left, left), capsys)


def test_a_change_that_the_examples_support(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each example lost two points: the interval has no width, leaves zero out, and the sentence says so."""
    left = suite(tmp_path / "A", scored((10.0, 20.0, 60.0)))
    right = suite(tmp_path / "B", scored((8.0, 18.0, 58.0)))
    found = beside(left, right)
    figure = figures(found.pairs[0])["rougeL"]
    assert figure.paired is not None
    assert figure.paired.interval == Interval(mean=-2, low=-2, high=-2)
    assert figure.paired.supported is True
    assert regressed(found).endswith("lora (rougeL -6.67%, supported by the interval)")
    assert "-6.67% (-2 to -2) fell by more than 5%, supported by the interval" in printed(found, capsys)


def test_a_change_that_the_examples_do_not_support(tmp_path: Path) -> None:
    """A mean that fell by the chance of one example falls, and the sentence says that the interval has zero in it."""
    left, right = scored((10.0, 10.0, 60.0, 10.0)), scored((14.0, 13.0, 30.0, 14.0))
    pair = held(tmp_path, left, right)
    figure = figures(pair)["rougeL"]
    assert figure.paired is not None
    assert figure.paired.interval is not None
    assert figure.paired.interval.low < 0 < figure.paired.interval.high
    assert figure.paired.supported is False
    sentence = regressed(beside(tmp_path / "A", tmp_path / "B"))
    assert sentence.endswith("lora (rougeL -21.1%, not supported by the interval)")


def test_a_loss_is_weighed_by_its_tokens(tmp_path: Path) -> None:
    """The interval's mean is the difference of the two losses, which are of tokens and not of examples."""
    old = scored((1.0, 1.0), (3.0, 10.0), labelled=(1, 9), loss=1.3)
    new = scored((1.0, 1.0), (5.0, 12.0), labelled=(1, 9), loss=1.7)
    paired = figures(held(tmp_path, old, new))["held_out_loss"].paired
    assert paired is not None
    assert paired.interval is not None
    assert paired.interval.mean == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"identity": "other"}, "they were not evaluated on the same examples"),
        ({"labelled": (1, 8)}, "their summaries are not of the same tokens"),
        ({"labelled": ()}, "not both records have the scores of each example"),
        ({"losses": (1.0, float("inf"))}, "not both records have the scores of each example"),
        ({"losses": ()}, "not both records have the scores of each example"),
    ],
)
def test_scores_that_cannot_be_paired(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """Where examples, tokens or scores are not the same there is no interval, and the reason is told."""
    scores: dict[str, Any] = {"losses": (3.0, 10.0), "labelled": (1, 9)}
    pair = held(tmp_path, scored((1.0, 1.0), **scores), scored((1.0, 1.0), **(scores | changes), loss=4.0))
    figure = figures(pair)["held_out_loss"]
    assert figure.paired is not None
    assert (figure.paired.interval, figure.paired.supported) == (None, None)
    assert figure.paired.missing == reason
    sentence = regressed(beside(tmp_path / "A", tmp_path / "B"))
    assert sentence.endswith("lora (held_out_loss +23.1%, no interval)")


def test_nothing_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two equal suites have no table at all."""
    left = suite(tmp_path / "A", scored((1.0, 2.0), (1.0, 2.0), labelled=(1, 2)), run("b"))
    found = beside(left, shutil.copytree(left, tmp_path / "B"))
    assert not found.changed
    assert not found.fell
    assert printed(found, capsys).splitlines()[2:] == ["nothing changed"]


def test_hostile_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither markup nor HTML nor pipes are taken for what they seem, and nothing moves the terminal's cursor."""
    names = ["[red]a[/red]", "<script>b", "c | d", ":boom:", "e\x1b[2J\nf\u202e"]
    left = suite(tmp_path / "A[bold]", *(run(name, versions={"torch": name}) for name in names))
    right = suite(tmp_path / "B", *(run(name, versions={"torch": "[/]"}, peak=2000) for name in names))
    found = beside(left, right)
    console = Console(force_terminal=True, width=200, color_system="standard")
    print_beside(found, console)
    out = capsys.readouterr().out
    text = re.sub(r"\x1b\[[0-9;]*m", "", out)  # colours are the only sequences there are
    assert "\x1b" not in text
    shown = [*names[:-1], r"e\x1b[2J\nf\u202e"]
    assert all(text.count(name) >= 3 for name in shown)  # as a value, as a run of the change, and in the figures
    assert "[/]" in text
    assert "A[bold] (5 runs)" in text
    assert all(name in regressed(found) for name in shown)
    assert "\n" not in regressed(found)


def test_a_verdict_needs_no_colour_and_no_wide_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On 80 columns every line fits, and words alone say which figure fell and which gained."""
    left, right = suite(tmp_path / "A", run()), suite(tmp_path / "B", run(peak=2000, speed=5000.0))
    print_beside(beside(left, right), Console(force_terminal=True, width=80, color_system=None))
    out = capsys.readouterr().out
    table = out.split("figures")[1]
    assert max(map(len, table.splitlines())) <= 80
    assert "fell by more than 5%" in table
    assert "gained more than 5%" in table


def test_the_command_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    """REGRESSED where a figure fell and zero where none did; the figures as JSON where that is asked for."""
    left, right = suite(tmp_path / "A", run()), suite(tmp_path / "B", run(peak=1060))
    compare = ["report", "--compare", str(left), str(right)]
    done = CliRunner().invoke(app, compare)
    assert done.exit_code == REGRESSED
    assert done.stderr == "fell by more than allowed: lora (train_peak_bytes +6%)\n"
    done = CliRunner().invoke(app, [*compare, "--threshold", "train_peak_bytes=6%"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.endswith("nothing fell by more than its threshold\n")
    done = CliRunner().invoke(app, [*compare, "--json"])
    assert done.exit_code == REGRESSED
    assert Beside.model_validate_json(done.stdout) == beside(left, right)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ("", 13, "there is no folder to report on; give the one that a suite wrote to, or --compare A B"),
        ("A --compare A A", 13, "--compare A B says which two folders are compared; leave FOLDER out"),
        ("--compare A A --into x --block table", 13, "leave --into and --block out"),
        ("--compare A A --by train.steps", 13, "leave --by out"),
        ("--compare A A --price-per-hour 0", 13, "leave --price-per-hour out"),
        ("A --json", 13, "--json cannot be meant for one folder; give two by --compare A B"),
        ("A --threshold 5%", 13, "--threshold cannot be meant for one folder"),
        ("--compare A A --threshold rogueL=5", 11, "did you mean 'rougeL'?"),
        ("--compare A A --threshold many", 12, "'many' is no threshold"),
        ("--compare A nowhere", 60, "no record.json below nowhere"),
        ("--compare nowhere A", 60, "no record.json below nowhere"),
        ("--compare A", 2, "requires 2 arguments"),
    ],
)
def test_a_command_that_cannot_be_meant(
    arguments: str, code: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not go together, and what is not there, is refused in one sentence; nothing is written."""
    suite(tmp_path / "A", run())
    monkeypatch.chdir(tmp_path)
    there = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, ["report", *arguments.split()])
    assert done.exit_code == code, done.output
    assert sentence in done.stderr
    assert not done.stdout
    assert sorted(tmp_path.rglob("*")) == there


def test_the_demo_and_a_changed_copy(tmp_path: Path) -> None:
    """The whole command, on shipped records: exit code, what goes to standard output, and what to standard error."""
    copy = shutil.copytree(DEMO, tmp_path / "after")
    old = read_record(copy / "lora" / FILE)
    assert old.quality is not None
    assert old.quality.loss is not None
    old.model_copy(update={
        "recipe": old.recipe | {"method": old.recipe["method"] | {"r": 99}},
        "quality": old.quality.model_copy(update={"loss": old.quality.loss * 1.1}),
    }).write(copy / "lora")  # fmt: skip
    shutil.rmtree(copy / "full")

    def compared(*sides: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from peftbench.cli import main; main()", "report", "--compare"]
        return subprocess.run([*command, *map(str, sides)], capture_output=True, text=True, check=False, timeout=120)

    same = compared(DEMO, DEMO)
    assert (same.returncode, same.stderr) == (0, "")
    assert same.stdout.splitlines()[-1] == "nothing changed"
    worse = compared(DEMO, copy)
    assert worse.returncode == REGRESSED
    assert worse.stderr == (
        "fell by more than allowed: lora (held_out_loss +10%, no interval), full (missing in B)\n"
    )  # fmt: skip
    lines = [" ".join(line.split()) for line in worse.stdout.splitlines()]
    assert f"method.r {old.recipe['method']['r']} 99 lora" in lines
    assert any(line.startswith("lora held_out_loss") and "fell by more than 5%" in line for line in lines)
    assert "full fell: missing in B" in lines


def test_a_comparison_needs_no_torch(tmp_path: Path) -> None:
    """Neither reading, nor drawing intervals, nor printing brings in torch or a library of models."""
    sides = suite(tmp_path / "A", scored((1.0, 2.0))), suite(tmp_path / "B", scored((2.0, 5.0)))
    code = (
        "import sys; from peftbench.cli import app; app(standalone_mode=False); "
        "sys.exit(bool({'torch', 'transformers', 'accelerate', 'datasets', 'peft'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "report", "--compare", *map(str, sides)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "+133% (" in done.stdout
