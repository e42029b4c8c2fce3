"""The GPU script, on a tiny model: every case, without data, hub or most of the libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftbench.methods import METHODS
from peftbench.record import read_records
from tests.helpers.paths import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks" / "gpu" / "measure.py"
ABSENT = (
    "datasets",
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
    "pandas",
    "pyarrow",
    "pynvml",
)
HIDE = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The script with what a machine need not have hidden from it and its processes, on CPU."""
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(hidden), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return [sys.executable, str(SCRIPT)]


def test_the_script_itself_starts_no_cuda() -> None:
    """The process that starts the cases imports nothing that could hold a part of the GPU beside them."""
    code = (
        f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); "
        "sys.exit(bool({'torch', 'transformers', 'bitsandbytes', 'peftbench'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_hidden_is_hidden(call: list[str]) -> None:
    """The other tests prove something: a library that is named absent cannot be imported."""
    done = subprocess.run([call[0], "-c", "import datasets"], check=False, capture_output=True, text=True)
    assert "halted; None in sys.modules" in done.stderr


@pytest.mark.slow  # some twenty processes, one after another
def test_every_case_is_measured_once(call: list[str], tmp_path: Path) -> None:
    """Four methods in two precisions, with and without checkpointing; the next call finds all records there."""
    out = [*call, "--tiny", "--out", str(tmp_path)]
    first = subprocess.run(out, check=True, capture_output=True, text=True)
    records = {record.name: record for record in read_records(tmp_path)}
    checkpointed = len(METHODS) - 1  # not the one whose trunk is frozen
    assert len(records) == 2 * (len(METHODS) + checkpointed) == len(first.stdout.splitlines())
    assert {record.recipe["method"]["kind"] for record in records.values()} == set(METHODS)
    for record in records.values():
        assert (record.outcome.kind, record.notes) == ("ok", ())
        step = record.flops.counted_step
        assert step is not None
        assert 0 < step.counted_flops == step.closed_form_flops
        assert record.throughput is not None
        assert record.throughput.steps == 4
        assert record.memory_breakdown is not None
        assert record.state_bytes is not None
        assert record.memory_breakdown.peak_bytes > record.state_bytes.total
    assert len({record.tokens.real for record in records.values() if record.tokens}) == 1
    plain, again = records["tiny_full_fp32"].flops, records["tiny_full_fp32_checkpointing"].flops
    assert plain.model_flops == again.model_flops
    assert plain.hardware_flops is not None
    assert again.hardware_flops is not None
    assert plain.hardware_flops < again.hardware_flops
    assert "FLOPs as counted" in first.stdout
    predicted = subprocess.run(
        [call[0], str(SCRIPT.with_name("predict.py")), "--tiny", str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""},
    )
    assert predicted.stdout.count("| tensors |") == len(records)
    assert "tensors: off by 0.000% in the median, 0.000% at worst" in predicted.stdout
    second = subprocess.run(out, check=True, capture_output=True, text=True)
    assert [line.split(": ")[1] for line in second.stdout.splitlines()] == ["has a record"] * len(records)


def test_no_time_left(call: list[str], tmp_path: Path) -> None:
    """A call whose time is over says what it left."""
    done = subprocess.run(
        [*call, "--tiny", "--minutes", "0", "--out", str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert done.stdout == "no time for the other 14 cases; the same call goes on with them\n"
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_said(call: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a library that is needed hears of it, and not of a process that returned 1."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['pydantic'] = None", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    done = subprocess.run([*call, "--tiny"], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "import of pydantic halted" in done.stderr


def test_a_record_of_another_version_is_made_again(call: list[str], tmp_path: Path) -> None:
    """What cannot be read is no record, and does not stand in its case's way for ever."""
    folder = tmp_path / "cpu" / "tiny_full_bf16"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text('{"schema_version": 0}', encoding="utf-8")
    case = [call[0], str(SCRIPT.with_name("case.py")), "--tiny", "--out", str(tmp_path), "tiny_full_bf16"]
    subprocess.run(case, check=True, capture_output=True)
    assert read_records(folder)[0].outcome.kind == "ok"


def test_without_a_gpu(call: list[str]) -> None:
    """In full size it does not go on to run for days on a CPU."""
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU here")
    done = subprocess.run(call, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no CUDA device; give --tiny for a try on CPU" in done.stderr
