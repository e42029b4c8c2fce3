"""Records round-trip through JSON; invalid ones are refused in one sentence."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from peftbench.errors import OutputError, RecordError
from peftbench.record import (
    EXIT_CODES,
    FINAL_OUTCOMES,
    RECORD_FILE,
    SCHEMA_VERSION,
    Compute,
    CountedStep,
    Device,
    Engine,
    Flops,
    Interval,
    Memory,
    MemoryBreakdown,
    Outcome,
    OutcomeKind,
    ParameterCounts,
    PerExample,
    PlannedMemory,
    Quality,
    RecordedPlan,
    RunRecord,
    Sample,
    SavedModel,
    StateBytes,
    Throughput,
    Tokens,
    TokensPerSecond,
    read_record,
    read_records,
    scan_records,
    train_peak_bytes,
)
from tests.helpers.records import damage_records
from tests.helpers.scores import build_scores

RECIPE = {
    "name": "run",
    "method": {"kind": "lora"},
    "train": {"seed": 0, "global_batch_size": 4, "precision": "fp32"},
    "data": {"seed": 0, "max_length": 8, "label_padding": False},
}


def record(**values: Any) -> RunRecord:
    """Return a record with the required fields and ``values``."""
    required: dict[str, Any] = {
        "name": "run",
        "started_at": "2026-01-02T03:04:05+00:00",
        "recipe": RECIPE,
        "recipe_fingerprint": "0123456789abcdef",
        "outcome": Outcome(kind="ok"),
        "device": Device(type="cpu", name="a processor", num_processes=1),
        "library_versions": {"torch": "2"},
    }
    return RunRecord(**required | values)


def full_setup() -> dict[str, Any]:
    """Return the fields that describe the run: outcome, environment, model and data."""
    return {
        "outcome": Outcome(
            kind="oom",
            step=3,
            phase="train",
            step_part="backward",
            requested_bytes=2**31,
            error="out of memory",
            memory_snapshot="oom_snapshot.pickle",
        ),
        "device": Device(type="cuda", name="a card", num_processes=2, memory_bytes=2**34),
        "git_commit": "abc+changes",
        "engine": Engine(
            distributed_type="MULTI_CPU",
            mixed_precision="bf16",
            optimizer_class="AdamW",
            micro_batch_size=2,
            gradient_accumulation_steps=4,
            num_threads=1,
        ),
        "parameters": ParameterCounts(total=10, trainable=1, added_frozen=2),
        "saved_model": SavedModel(weight_bytes=100, merges_into_base=True),
        "model_fingerprint": "blake2b 00",
        "model_config_fingerprint": "blake2b 11",
        "data_fingerprint": "11",
        "num_examples": {"train": 8},
        "num_dropped_examples": {"train": 1},
        "evaluated_at": "2026-01-02T00:00:00+00:00",
        "num_cut_examples": {"train": 2},
        "num_cut_labels": {"train": 5},
        "num_control_token_examples": {"test": 1},
        "stopped_early": True,
        "held_out_curve": {"split": "validation", "num_examples": 4, "points": ()},
        "forgetting": {"text": "shipped", "text_fingerprint": "f", "window_tokens": 256, "num_tokens": 9},
        "split_overlap": {"texts": 2, "texts_with_reference": 1, "ids": 3, "same_file": False},
        "notes": ("a note",),
    }


def full_steps() -> dict[str, Any]:
    """Return the measurements of training steps: losses, tokens, times, FLOPs and energy."""
    return {
        "steps": 2,
        "skipped_steps": 1,
        "untimed_steps": 1,
        "resumed_after": (1,),
        "tokens": Tokens(real=5, padded=8, labeled=2, virtual=1),
        "step_losses": (2.5, 1 / 3),
        "step_seconds": (0.1, 0.2),
        "step_tokens": (2, 3),
        "step_part_seconds": {"forward": 0.5},
        "part_timed_steps": (2, 3),
        "phase_seconds": {"train": 1.5},
        "flops": Flops(
            model_flops=1,
            hardware_flops=2,
            six_n=3,
            counted_step=CountedStep(step=1, counted_flops=2, closed_form_flops=2),
        ),
        "compute": Compute(
            model_flops_per_second=1e9,
            hardware_flops_per_second=2e9,
            peak_flops_per_second=4e9,
            matmul_flops_per_second=3e9,
        ),
        "throughput": Throughput(
            steps=3,
            step_seconds_median=0.5,
            step_seconds_p10=0.4,
            step_seconds_p90=0.6,
            samples_per_second=8.0,
            tokens_per_second=TokensPerSecond(real=1.0, padded=2.0, labeled=0.5, virtual=0.0),
            data_time_fraction=0.1,
        ),
        "energy_joules": 4.5,
    }


def full_memory() -> dict[str, Any]:
    """Return the measurements of memory."""
    return {
        "memory": {"train": Memory(allocated_bytes=1, reserved_bytes=2, rss_bytes=3)},
        "memory_by_rank": ({"train": Memory(allocated_bytes=1)}, {"train": Memory(allocated_bytes=2)}),
        "step_memory": {
            "forward": Memory(allocated_bytes=1, inactive_split_bytes=1, num_alloc_retries=0, process_bytes=9),
        },
        "step_memory_by_rank": ({"forward": Memory(allocated_bytes=1)},),
        "cuda_context_bytes": 7,
        "state_bytes": StateBytes(weights=1, gradients=2, optimizer=3, cpu_offloaded=1, expected_optimizer=4),
        "state_bytes_by_rank": (StateBytes(weights=1, gradients=2, optimizer=3),),
        "memory_breakdown": MemoryBreakdown(
            step=5,
            micro_batch_size=2,
            sequence_length=8,
            peak_bytes=10,
            bytes_by_category={"weights": 10},
            operation="aten.mm",
            step_part="forward",
        ),
        "plan": RecordedPlan(
            predicted=PlannedMemory(
                device_profile="CPU",
                step=5,
                micro_batch_size=2,
                sequence_length=8,
                labeled_tokens=3,
                measured_positions=16,
                peak_phase="backward",
                live_bytes=10,
                allocated_bytes=12,
                reserved_bytes=20,
                process_bytes=(22, 24),
            )
        ),
    }


def full_quality() -> Quality:
    """Return a quality with every field set."""
    interval = Interval(mean=2.0, low=1.0, high=3.0)
    return Quality(
        split="test",
        num_examples=2,
        loss=1.0,
        perplexity=math.e,
        metrics=build_scores(exact_match=interval),
        headline_metric="exact_match",
        teacher_forced_metrics=build_scores(bleu=interval),
        samples=(Sample(id="1", prompt="é", reference="b", generated="c"),),
        per_example=PerExample(
            examples_fingerprint="22", loss=(0.1, 1 / 3), labeled_tokens=(1, 2), metrics={"exact_match": (1.5, 2.5)}
        ),
    )


def full_record() -> RunRecord:
    """Return a record with every field set."""
    return record(**full_setup(), **full_steps(), **full_memory(), quality=full_quality())


def test_full_record_sets_every_field() -> None:
    """The record of the round-trip test covers every field."""
    unset = set(RunRecord.model_fields) - full_record().model_fields_set - {"schema_version"}
    assert not unset


def test_record_without_a_plan_is_read(tmp_path: Path) -> None:
    """Records that were written before plans were recorded have none."""
    values = json.loads(full_record().model_dump_json())
    assert values.pop("plan") is not None
    path = tmp_path / RECORD_FILE
    path.write_text(json.dumps(values), encoding="utf-8")
    assert read_record(path).plan is None


@pytest.mark.parametrize("original", [record(), full_record()], ids=["minimal", "full"])
def test_written_record_reads_back_equal(original: RunRecord, tmp_path: Path) -> None:
    """The record read equals the one written, to the last digit; the file is plain JSON."""
    path = original.write(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / RECORD_FILE
    assert read_record(path) == original
    assert json.loads(path.read_text(encoding="utf-8"))["schema_version"] == SCHEMA_VERSION


def test_unknown_values_are_none() -> None:
    """A value that was not measured is None, never zero."""
    bare = record()
    unknown = [bare.git_commit, bare.engine, bare.parameters, bare.tokens, bare.energy_joules, bare.quality]
    assert unknown == [None] * len(unknown)
    assert bare.train_seconds is None
    assert bare.flops == Flops(model_flops=None, hardware_flops=None, six_n=None)


def test_nan_and_infinity_survive_json(tmp_path: Path) -> None:
    """NaN losses and infinite perplexity round-trip through strict JSON."""
    quality = Quality(split="test", num_examples=1, loss=800.0, perplexity=math.inf)
    path = record(step_losses=(1.0, math.nan, -math.inf), quality=quality).write(tmp_path)

    def fail(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(encoding="utf-8"), parse_constant=fail)
    again = read_record(path)
    assert again.step_losses[0] == 1.0
    assert math.isnan(again.step_losses[1])
    assert again.step_losses[2] == -math.inf
    assert again.quality is not None
    assert again.quality.perplexity == math.inf


def test_train_seconds_exclude_other_phases() -> None:
    """Building and evaluation do not count as training time."""
    assert record(phase_seconds={"build": 5.0, "train": 1.5, "evaluate": 7.0}).train_seconds == 1.5


def test_every_outcome_has_an_exit_code() -> None:
    """Exit codes are distinct, ok is 0, and final outcomes are a subset."""
    assert set(EXIT_CODES) == set(get_args(OutcomeKind))
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)
    assert EXIT_CODES["ok"] == 0
    assert set(EXIT_CODES) > FINAL_OUTCOMES


def dump_with(**values: Any) -> str:
    """Return the JSON of a record with some values replaced."""
    return json.dumps(record().model_dump(mode="json") | values)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "the file"),
        ("{not json", "the file"),
        ("[]", "the file"),
        (dump_with(schema_version=SCHEMA_VERSION + 1), "schema_version"),
        (dump_with(a_field_of_tomorrow=1), "a_field_of_tomorrow"),
        (dump_with(outcome={"kind": "splendid"}), "outcome.kind"),
        (dump_with(device=None), "device"),
        (dump_with(step_losses=[1.0, None]), "step_losses.1"),
    ],
)
def test_invalid_record_is_refused_with_its_path(text: str, where: str, tmp_path: Path) -> None:
    """The one-line error names the file and the location in it."""
    path = tmp_path / RECORD_FILE
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecordError) as caught:
        read_record(path)
    assert str(path) in str(caught.value)
    assert f": {where} " in str(caught.value)
    assert "Input" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "missing",
    [
        "method.kind",
        "train.seed",
        "data.seed",
        "train.global_batch_size",
        "train.precision",
        "data.max_length",
        "data.label_padding",
    ],
)
@pytest.mark.parametrize("section_is_null", [False, True])
def test_recipe_without_a_required_key_is_refused(missing: str, section_is_null: bool, tmp_path: Path) -> None:
    """The error names the file and the missing key."""
    recipe: dict[str, Any] = dict(RECIPE)
    section, name = missing.split(".")
    values = {key: value for key, value in recipe[section].items() if key != name}
    recipe[section] = None if section_is_null else values
    path = full_record().model_copy(update={"recipe": recipe}).write(tmp_path)
    key = section if section_is_null else missing
    with pytest.raises(RecordError, match=f"is not a record: its recipe has no {key}") as raised:
        read_record(path)
    assert str(path) in str(raised.value)


def test_missing_record_is_refused(tmp_path: Path) -> None:
    """A missing file and a directory raise RecordError with the path."""
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(RecordError, match="cannot be read: "):
            read_record(path)


def test_read_records_finds_nested_records_in_order(tmp_path: Path) -> None:
    """Records at any depth are read in path order; other files are ignored."""
    for name in ("b", "a", "c/deep"):
        record(name=name.replace("/", "-")).write(tmp_path / name)
    (tmp_path / "a" / "other.json").write_text("{}", encoding="utf-8")
    assert [entry.name for entry in read_records(tmp_path)] == ["a", "b", "c-deep"]


def test_scan_keeps_the_readable_records(tmp_path: Path) -> None:
    """A damaged record is named with its reason; the others are read in path order."""
    for name in ("b", "a"):
        record(name=name).write(tmp_path / name)
    reasons = damage_records(tmp_path / "x")
    scan = scan_records(tmp_path)
    assert [entry.name for entry in scan.records.values()] == ["a", "b"]
    assert len(reasons) >= 8
    assert {path.parent.name for path in scan.unreadable} == set(reasons)
    for path, sentence in scan.unreadable.items():
        assert str(path) in sentence
        assert reasons[path.parent.name] in sentence
        assert "\n" not in sentence
    with pytest.raises(RecordError, match=r"no readable record\.json below .* \(and \d+ more\)"):
        scan_records(tmp_path / "x")
    assert scan_records(tmp_path / "x", allow_empty=True).records == {}
    with pytest.raises(RecordError, match=r"No record\.json below"):
        scan_records(tmp_path / "a" / "nothing")


def test_record_without_permission_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's reason is given; the other record is read."""
    record(name="a").write(tmp_path / "a")
    secret = record(name="b").write(tmp_path / "b")
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == secret:  # root can read every file
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    scan = scan_records(tmp_path)
    assert [entry.name for entry in scan.records.values()] == ["a"]
    assert scan.unreadable == {secret: f"{secret} cannot be read: Permission denied"}


def test_folder_without_records_is_refused(tmp_path: Path) -> None:
    """A folder without records is an error, not an empty report."""
    with pytest.raises(RecordError, match=r"No record\.json below"):
        read_records(tmp_path)


def test_unwritable_path_raises_output_error(tmp_path: Path) -> None:
    """Writing below a regular file raises OutputError."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OutputError):
        record().write(tmp_path / "file")


def test_record_is_frozen() -> None:
    """Assigning to a field raises."""
    with pytest.raises(ValueError, match="frozen"):
        record().name = "other"  # type: ignore[misc]


def test_record_package_imports_no_torch() -> None:
    """Importing peftbench.record imports none of torch, transformers and datasets."""
    code = "import sys, peftbench.record; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_utilization_is_none_without_its_denominator() -> None:
    """Each utilization divides by its own peak and is None if that is unknown."""
    known = Compute(
        model_flops_per_second=1.0,
        hardware_flops_per_second=2.0,
        peak_flops_per_second=8.0,
        matmul_flops_per_second=4.0,
    )
    assert (known.mfu, known.hfu, known.matmul_utilization) == (0.125, 0.25, 0.25)
    unknown = Compute(model_flops_per_second=1.0)
    assert (unknown.mfu, unknown.hfu, unknown.matmul_utilization) == (None, None, None)


def test_energy_and_cost_match_closed_form() -> None:
    """9 J over 3 steps of 4 samples is 750 J per 1,000; 1.5 s on 2 devices at 12 per hour costs 0.01."""
    recipe = {"train": {"global_batch_size": 4}, "profile": {"price_per_hour": 12.0}}
    known = full_record().model_copy(update={"energy_joules": 9.0, "recipe": recipe})
    assert known.joules_per_1000_samples == 750
    assert known.training_cost == pytest.approx(0.01)
    assert known.with_price_per_hour(24.0).training_cost == pytest.approx(0.02)
    on_cpu = known.model_copy(update={"device": Device(type="cpu", name="a processor", num_processes=2)})
    assert on_cpu.training_cost == pytest.approx(0.005)  # two processes share one machine
    assert record().joules_per_1000_samples is None
    assert record().training_cost is None
    assert record(phase_seconds={"train": 1.5}).training_cost is None


def test_peak_of_a_run_out_of_memory_in_warmup() -> None:
    """The peak is that of warmup; for a run that ended as ok, warmup does not count."""
    memory = {"warmup": Memory(allocated_bytes=7)}
    assert train_peak_bytes(record(outcome=Outcome(kind="oom", phase="warmup"), memory=memory)) == 7
    assert train_peak_bytes(record(memory=memory)) is None


def test_fragmentation_is_the_unallocated_fraction_of_reserved_bytes() -> None:
    """It is None if no bytes are reserved or the value is unknown."""
    assert Memory(allocated_bytes=75, reserved_bytes=100).fragmentation == 0.25
    assert Memory(allocated_bytes=0, reserved_bytes=0).fragmentation is None
    assert Memory(rss_bytes=3).fragmentation is None
