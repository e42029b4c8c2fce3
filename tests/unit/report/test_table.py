"""Tables built from records."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from peftbench.errors import RecordError
from peftbench.record import (
    Compute,
    Flops,
    Interval,
    Memory,
    Outcome,
    ParameterCounts,
    Quality,
    RunRecord,
    Sample,
    Score,
    ScoreDefinition,
    Throughput,
    TokensPerSecond,
)
from peftbench.report.runs import sort_records
from peftbench.report.tables.columns import build_columns
from peftbench.report.tables.table import (
    _rich_table,
    _table_width,
    collect_notes,
    csv_table,
    insert_table,
    markdown_report,
    markdown_table,
    natural_width,
    print_table,
)
from peftbench.report.text.escape import terminal_safe
from tests.helpers.scores import build_scores
from tests.unit.report.records import build_record


def test_report_imports_no_torch() -> None:
    """Check that importing the report imports neither torch nor a model library."""
    code = (
        "import sys, peftbench.report.tables.table, peftbench.record; "
        "sys.exit(bool({'torch', 'transformers', 'accelerate', 'datasets', 'peft'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rows_are_sorted_by_trainable_parameters() -> None:
    """Sort baselines first, then methods by their number of trainable parameters."""
    rows = [
        build_record("b", "full", 1000),
        build_record("a", "lora", 10),
        build_record("c", "zero_shot", 0),
        build_record("d", "lead", None),
    ]
    assert [row.name for row in sort_records(rows)] == ["d", "c", "a", "b"]


def test_cells_match_known_metrics() -> None:
    """Show each metric in its column, and a dash for an unknown value."""
    text = markdown_table(
        [build_record("mine", "lora", 10), build_record("lead_1", "lead", None, phase_seconds={}, tokens=None)]
    )
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    score = "31.2 (30.0–32.5)"
    assert lines[2] == ["lead_1", "–", "–", "3.250", score, score, score, score, "–", "ok"]
    assert lines[3] == ["mine (lora)", "10", "1.00%", "3.250", score, score, score, score, "12.5", "ok"]


def test_columns_have_descriptions_and_unique_csv_names() -> None:
    """Check that each column has a description and that no two columns write the same CSV field."""
    one = build_record("x", "full", 1)
    columns = build_columns([one])
    names = [name for column in columns for name in column.raw_values(one)]
    assert len(columns) > 8
    assert all(column.description for column in columns)
    assert len(names) == len(set(names))


def test_column_is_sorted_by_the_value_it_shows() -> None:
    """Check that a column's first raw value, which sorts the rows, matches the text it shows."""
    tokens_per_second = TokensPerSecond(real=123.0, padded=200.0, labeled=50.0, virtual=7.0)
    speed = Throughput(
        steps=10,
        step_seconds_median=1,
        step_seconds_p10=1,
        step_seconds_p90=1,
        samples_per_second=1,
        data_time_fraction=0,
        tokens_per_second=tokens_per_second,
    )
    run_record = build_record(
        "a",
        "full",
        640,
        throughput=speed,
        energy_joules=400.0,
        flops=Flops(model_flops=2 * 10**12, hardware_flops=9 * 10**12),
        memory={"train": Memory(allocated_bytes=5 * 2**20, reserved_bytes=8 * 2**20)},
        compute=Compute(model_flops_per_second=1.0, hardware_flops_per_second=3.0, peak_flops_per_second=4.0),
    )
    expected = {
        "energy (J / 1k samples)": 2500.0,
        "tokens/s": 123.0,
        "model compute (TFLOP)": 2e12,
        "MFU": 0.25,
        "peak mem (MiB)": 5 * 2**20,
    }
    first_values = {
        column.title: next(iter(column.raw_values(run_record).values())) for column in build_columns([run_record])
    }
    assert {title: first_values[title] for title in expected} == expected


def test_memory_and_flops_have_columns_if_known() -> None:
    """Show the training peak: allocated bytes on a GPU, bytes above the baseline on a CPU; omit an unknown column."""
    on_gpu = build_record("a", "full", 1, memory={"train": Memory(allocated_bytes=3 * 2**20, reserved_bytes=9 * 2**20)})
    on_cpu = build_record(
        "b",
        "full",
        1,
        memory={
            "train": Memory(rss_bytes=700 * 2**20, baseline_rss_bytes=600 * 2**20),
            "evaluate": Memory(rss_bytes=900 * 2**20, baseline_rss_bytes=600 * 2**20),
        },
        flops=Flops(model_flops=25 * 10**11, hardware_flops=3 * 10**12, six_n=9),
    )
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(csv_table([on_gpu, on_cpu])))}
    assert (rows["a"]["train_peak_bytes"], rows["b"]["train_peak_bytes"]) == (str(3 * 2**20), str(100 * 2**20))
    assert (rows["a"]["model_flops"], rows["b"]["model_flops"]) == ("", "2500000000000")
    table = markdown_table([on_gpu, on_cpu])
    assert "| 100 |" in " ".join(table.split())
    assert "2.5 |" in table
    assert "peak mem (MiB)" not in markdown_table([build_record("c", "full", 1)])


def test_teacher_forced_rouge_has_its_own_column() -> None:
    """Keep it separate from ROUGE of generated text; show the column only if a run computed it."""
    plain = build_record("a", "full", 1)
    forced = build_scores(rougeL=Interval(mean=77.0, low=76.0, high=78.0))
    assert plain.quality is not None
    with_forced = build_record(
        "b", "full", 1, quality=plain.quality.model_copy(update={"teacher_forced_metrics": forced})
    )
    assert "teacher-forced" not in markdown_table([plain])
    table = markdown_table([plain, with_forced])
    assert "ROUGE-L, teacher-forced argmax" in table
    assert "77.0 (76.0–78.0)" in table
    assert "31.2 (30.0–32.5)" in table


def test_csv_keeps_full_precision() -> None:
    """Write raw values with units in the column names, and an empty cell for an unknown value."""
    (row,) = csv.DictReader(io.StringIO(csv_table([build_record("a", "lora", 10, loss=1 / 3)])))
    assert float(row["held_out_loss"]) == 1 / 3
    assert (row["trainable_fraction"], row["rougeL_low"], row["train_seconds"]) == ("0.01", "30.0", "12.5")
    assert row["joules_per_1000_samples"] == ""


def test_unequal_runs_have_a_note() -> None:
    """Add a note to a table of runs with different batch sizes, but not to one of equal runs."""
    equal = [build_record("a", "full", 1000), build_record("b", "lora", 10)]
    assert collect_notes(equal) == []
    assert "more than their method" in collect_notes([*equal, build_record("c", "lora", 10, global_batch_size=2)])[0]


def test_equal_notes_of_several_runs_are_printed_once() -> None:
    """A note of all runs names no run; one of some runs names those."""
    runs = [build_record(name, "lora", 10, notes=notes) for name, notes in (("a", ("x", "y")), ("b", ("x", "y")))]
    assert collect_notes([*runs, build_record("c", "lora", 10, notes=("x",))]) == ["all runs: x", "a and b: y"]


def test_oom_run_has_a_row() -> None:
    """Show a run that did not fit with the step at which it ran out of memory."""
    outcome = Outcome(kind="oom", step=1, phase="train", requested_bytes=2**30)
    assert "oom at step 1" in markdown_table([build_record("a", "full", 1000, outcome=outcome, quality=None)])


def test_table_without_terminal_shows_every_run_and_column(capsys: pytest.CaptureFixture[str]) -> None:
    """Check that each run name and each ROUGE column title is printed without a line break."""
    rows = [build_record("first", "full", 1000), build_record("second", "lora", 10)]
    print_table(rows, "title", Console(force_terminal=False))
    printed = capsys.readouterr().out
    assert "first (full)" in printed
    assert "second (lora)" in printed
    assert all(title in printed for title in ("ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum"))
    assert "do not fit" not in printed


def test_narrow_terminal_lists_omitted_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """On 80 columns, print each run on one line, keep ROUGE-L, and name the columns that do not fit."""
    gpt2 = {
        name: ParameterCounts(total=124_439_808, trainable=n) for name, n in (("full", 124_439_808), ("tuned", 15_360))
    }
    rows = [
        build_record("full", "full", 1, parameters=gpt2["full"]),
        build_record("prompt_tuning", "prompt_tuning", 1, parameters=gpt2["tuned"]),
    ]
    print_table(rows, "title", Console(force_terminal=True, width=80, color_system=None))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "124,439,808" in printed
    assert "prompt_tuning" in printed
    assert "ROUGE-L" in printed.split("columns that do not fit")[0]
    assert "(columns that do not fit: ROUGE-Lsum, ROUGE-2, ROUGE-1; see the report)" in printed


def test_report_shows_the_same_example_for_every_run() -> None:
    """Show all summaries of one example in one table, and escape pipes in it."""
    text = markdown_report([build_record("a", "full", 1000), build_record("b", "lora", 10)], "T", ["A | sentence."])
    assert "- A \\| sentence." in text
    assert "by a" in text
    assert "by b" in text
    assert "ref \\| x" in text


def test_summary_of_another_example_with_equal_id_is_not_shown() -> None:
    """Compare the articles too, because two data sets may use the same ids."""
    other = build_record("other", "lora", 10)
    assert other.quality is not None
    sample = Sample(id="a", prompt="another", reference="ref | x", generated="by other")
    other = other.model_copy(update={"quality": other.quality.model_copy(update={"samples": (sample,)})})
    text = markdown_report([build_record("b", "lora", 10), other], "T", [])
    assert "by b" in text
    assert "by other" not in text


HOSTILE = "a [/b]\n# x | `y` <script>1</script> *z* \x1b[2J =1"


def build_hostile_record() -> RunRecord:
    """Build a record with hostile text in each text field that a user or a model can write."""
    run_record = build_record(HOSTILE, "lora", 10, notes=(HOSTILE,))
    assert run_record.quality is not None
    sample = Sample(id=HOSTILE, prompt=f"{HOSTILE}\n---\n- x", reference=HOSTILE, generated=HOSTILE)
    return run_record.model_copy(update={"quality": run_record.quality.model_copy(update={"samples": (sample,)})})


def test_markdown_escapes_hostile_text() -> None:
    """Check that names, notes, sentences, titles and summaries break no table and add no markup or HTML."""
    rows = [build_hostile_record(), build_record("prompt_tuning", "prompt_tuning", 100)]
    text = markdown_report(rows, HOSTILE, [HOSTILE])
    shown = "a \\[/b\\] # x \\| \\`y\\` &lt;script&gt;1&lt;/script&gt; \\*z\\* \\\\x1b\\[2J =1"
    assert text.startswith(f"# {shown}\n\n- {shown}\n\n| run ")
    assert f"- {shown}: {shown}\n" in text
    assert f"\n\n{shown}\n\n> a" in text
    assert "\n> \\---\n> \\- x\n" in text
    assert text.count(f"| {shown} ") == 4  # the run's row, the reference, and the summary with the run's name
    assert text.count("| prompt_tuning ") == 1
    assert "<script" not in text
    assert all(char == "\n" or char.isprintable() for char in text)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4 + 4
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table[:4]}) == 1


def test_summaries_that_look_like_numbers_stay_text() -> None:
    """Keep a summary such as "1e3", which is not 1000."""
    run_record = build_record("a", "full", 1)
    assert run_record.quality is not None
    sample = Sample(id="a", prompt="x", reference="1e3", generated="1_000")
    run_record = run_record.model_copy(update={"quality": run_record.quality.model_copy(update={"samples": (sample,)})})
    text = markdown_report([run_record], "T", [])
    assert "| reference | 1e3 " in text
    assert "| 1_000 " in text


@pytest.mark.parametrize("terminal", [True, False])
def test_terminal_escapes_hostile_names(terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that names apply no markup, move no cursor and break no row, in the table over seeds too."""
    rows = [
        build_hostile_record(),
        build_record(f"{HOSTILE}-2", "lora", 10, seed=1),
        build_record("[bold]:smile:[/bold]", "full", 1),
    ]
    print_table(rows, HOSTILE, Console(force_terminal=terminal, width=300, color_system=None))
    printed = capsys.readouterr().out
    assert "[bold]:smile:[/bold] (full)" in printed
    assert f"note: {terminal_safe(HOSTILE)}: {terminal_safe(HOSTILE)}\n" in printed
    assert printed.count(terminal_safe(HOSTILE)) >= 5
    assert "\x1b[2J" not in printed


def test_table_width_equals_width_in_rich() -> None:
    """Count terminal cells, with wide characters and line breaks."""
    for cells in ({"a": ["x"]}, {"a": ["x", "yyy"], "b c": ["1\n(2 to 3)", "2"], "end": ["ok", "漢字"]}):
        assert _table_width(cells) == natural_width(Console(width=10), _rich_table(cells, "title"))


def test_grouped_table_escapes_values_of_the_key(tmp_path: Path) -> None:
    """Check that values in the table head do not break it, and that the lowest loss stays bold."""
    rows = [build_record(f"a{i}", "lora", 10, method={"x": x}, loss=2.0 + i) for i, x in enumerate(("a|b", "<i>"))]
    file = tmp_path / "page.md"
    file.write_text("<!-- report:x -->\n<!-- end of report:x -->\n")
    insert_table(rows, file, "x", "method.x")
    head, _, cells = file.read_text().splitlines()[2:5]
    assert '"a\\|b"' in head
    assert "&lt;i&gt;" in head
    assert "**2.000**" in cells


def test_csv_escapes_spreadsheet_formulas() -> None:
    """Prefix text that could start a formula with an apostrophe; a number stays a number."""
    (row,) = csv.DictReader(io.StringIO(csv_table([build_record("=cmd()", "lora", 10, loss=-1.5)])))
    assert (row["run"], row["held_out_loss"]) == ("'=cmd()", "-1.5")
    head, line, _ = csv_table([build_record("a;=1+1", "lora", 10, loss=-1.5)]).split("\n")
    assert head.startswith('"run","method",')
    assert line.startswith('"a;=1+1","lora",')
    assert ",-1.5," in line


def test_insert_table_replaces_only_its_block(tmp_path: Path) -> None:
    """Check that inserting again changes nothing, and that an unknown marker is refused."""
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- report:x -->\nold\n<!-- end of report:x -->\nafter\n")
    insert_table([build_record("a", "full", 1000)], file, "x")
    after_first_insert = file.read_text()
    insert_table([build_record("a", "full", 1000)], file, "x")
    assert file.read_text() == after_first_insert
    assert after_first_insert.startswith("before\n")
    assert after_first_insert.endswith("after\n")
    assert "old" not in after_first_insert
    with pytest.raises(RecordError, match="has no section 'y'"):
        insert_table([build_record("a", "full", 1000)], file, "y")


def parse_single_row(table: str) -> dict[str, str]:
    """Return the cells of a Markdown table with one row, by column title."""
    head, _, cells = table.splitlines()
    return {k.strip(): v.strip() for k, v in zip(head.split("|"), cells.split("|"), strict=True)}


def test_unknown_metrics_have_notes() -> None:
    """Note why a metric is unknown; omit its column if nothing was trained."""
    speed = Throughput(
        steps=5,
        step_seconds_median=1,
        step_seconds_p10=1,
        step_seconds_p90=1,
        samples_per_second=1.0,
        data_time_fraction=0,
        tokens_per_second=TokensPerSecond(real=1, padded=1, labeled=1, virtual=0),
    )
    unknown, known = (
        build_record("a", "full", 1, throughput=speed),
        build_record("b", "lora", 1, throughput=speed, energy_joules=40.0, compute=Compute(peak_flops_per_second=1e9)),
    )
    mfu, energy = collect_notes([unknown])
    assert mfu == "MFU is unknown: no data sheet FLOP/s for a CPU at fp32"
    assert energy == "energy is unknown: neither NVML nor RAPL is available"
    assert collect_notes([known]) == []
    cells = parse_single_row(markdown_table([unknown]))
    assert (cells["MFU"], cells["energy (J / 1k samples)"]) == ("unknown", "unknown")
    assert "MFU" not in parse_single_row(markdown_table([build_record("lead", "lead", None, tokens=None)]))
    table = markdown_table([known.with_price_per_hour(3600.0)])
    cells = parse_single_row(table)
    assert cells["energy (J / 1k samples)"] == "500"
    assert float(cells["training cost"]) == 12  # 12.5 seconds, rounded to two digits


def test_scores_with_the_same_title_have_their_own_columns() -> None:
    """Two functions of the user's may have the same name in two modules; the column then has the full name."""
    score = Score(
        interval=Interval(mean=1.5, low=1.0, high=2.0),
        definition=ScoreDefinition(title="recall", unit="recall", digits=2, higher_is_better=True),
    )
    quality = Quality(split="test", num_examples=3, metrics={"a:recall": score, "b:recall": score})
    table = markdown_table([build_record("x", "full", 1, quality=quality)])
    assert "recall (a:recall)" in table
    assert "recall (b:recall)" in table
    assert table.count("1.50 (1.00–2.00)") == 2
