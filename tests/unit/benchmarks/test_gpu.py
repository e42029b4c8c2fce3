"""The GPU benchmark on a tiny model: every case, without data, the Hub or most libraries."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

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
    """Return the command of the benchmark on CPU; it and its subprocesses cannot import optional libraries."""
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(hidden), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return [sys.executable, str(SCRIPT)]


def test_measure_script_imports_no_cuda_library() -> None:
    """The process that starts the cases imports nothing that could allocate GPU memory."""
    code = (
        f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); "
        "sys.exit(bool({'torch', 'transformers', 'bitsandbytes', 'peftbench'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_hidden_library_cannot_be_imported(call: list[str]) -> None:
    """The other tests rely on the fixture, which hides the libraries."""
    done = subprocess.run([call[0], "-c", "import datasets"], check=False, capture_output=True, text=True)
    assert "halted; None in sys.modules" in done.stderr


@pytest.mark.slow  # about twenty processes, one after another
def test_every_case_is_measured_once_and_predicted(call: list[str], tmp_path: Path) -> None:
    """Four methods in two precisions, with and without checkpointing; the second call skips all of them."""
    command = [*call, "--tiny", "--out", str(tmp_path)]
    first = subprocess.run(command, check=True, capture_output=True, text=True)
    records = {record.name: record for record in read_records(tmp_path)}
    methods = {"full", "last_layer", "lora", "prompt_tuning"}
    num_checkpointed = len(methods) - 1  # all but the method with a frozen backbone
    assert len(records) == 2 * (len(methods) + num_checkpointed) == len(first.stdout.splitlines())
    assert {record.recipe["method"]["kind"] for record in records.values()} == methods
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
    plain, checkpointing = records["tiny_full_fp32"].flops, records["tiny_full_fp32_checkpointing"].flops
    assert plain.model_flops == checkpointing.model_flops
    assert plain.hardware_flops is not None
    assert checkpointing.hardware_flops is not None
    assert plain.hardware_flops < checkpointing.hardware_flops
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
    second = subprocess.run(command, check=True, capture_output=True, text=True)
    assert [line.split(": ")[1] for line in second.stdout.splitlines()] == ["has a record"] * len(records)


def test_time_limit_is_reported(call: list[str], tmp_path: Path) -> None:
    """After the time limit the script prints the number of remaining cases."""
    done = subprocess.run(
        [*call, "--tiny", "--minutes", "0", "--out", str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert done.stdout == "time is up; 14 cases are left; run the same command again to resume\n"
    assert not list(tmp_path.iterdir())


def test_missing_library_is_named(call: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing required library is named in the error."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['pydantic'] = None", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    done = subprocess.run([*call, "--tiny"], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "import of pydantic halted" in done.stderr


@pytest.mark.slow
def test_unreadable_record_is_measured_again(call: list[str], tmp_path: Path) -> None:
    """A record with an unknown schema version is replaced."""
    folder = tmp_path / "cpu" / "tiny_full_bf16"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text('{"schema_version": 0}', encoding="utf-8")
    case = [call[0], str(SCRIPT.with_name("case.py")), "--tiny", "--out", str(tmp_path), "tiny_full_bf16"]
    subprocess.run(case, check=True, capture_output=True)
    assert read_records(folder)[0].outcome.kind == "ok"


def test_case_without_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A case of the full size ends before it is measured; the other script returns the exit code of its cases."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.delitem(sys.modules, "cases", raising=False)  # other benchmarks have a module of this name
    monkeypatch.setattr(sys, "argv", ["case.py", "gpt2_full_fp32"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT.with_name("case.py")), run_name="__main__")
    del sys.modules["cases"]
    assert ended.value.code == 2
    assert capsys.readouterr().err == "no CUDA device found; use --tiny to try it on CPU\n"


@pytest.mark.slow  # two processes that import all libraries
def test_full_size_without_gpu_is_refused(call: list[str]) -> None:
    """The full benchmark does not start on a CPU."""
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    done = subprocess.run(call, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device found; use --tiny to try it on CPU" in done.stderr
