"""Each architecture and method has an exact plan or the error message that docs/reference/architectures.md states."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from peftbench.data.sources import Files
from peftbench.errors import EstimateUnavailableError, OutOfRangeError, PeftbenchError, UnsupportedModelError
from tests.helpers.architecture_plans import (
    CASES,
    EXACT,
    METHODS,
    UNPLANNED,
    compare_run_and_plan,
    plan_on_gpu,
    write_tiny_config,
)
from tests.helpers.paths import REPOSITORY
from tests.helpers.workshop import Workshop

TABLE = REPOSITORY / "docs" / "reference" / "architectures.md"


def read_table() -> dict[tuple[str, str], str]:
    """Return the documented outcome by architecture and method."""
    rows = [line.strip("| ").split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    header, _, *body = rows
    return {(case, method): cell for case, *cells in body for method, cell in zip(header[1:], cells, strict=True)}


EXPECTED = read_table()
FAST = {
    ("llama", "lora, peft's targets"),
    ("mistral, window", "lora"),
    ("gpt2", "full"),
    ("gemma2", "last layer"),
    ("falcon", "prompt tuning"),
    ("bloom", "full"),
    ("mixtral", "lora"),
    ("olmoe", "full"),
    ("deepseek_v3", "lora"),
    ("mamba", "full"),
    ("jamba", "lora"),
    ("qwen3_next", "prompt tuning"),
    ("bert", "lora"),
    ("trocr", "last layer"),
    ("bart", "full"),
    ("whisper", "prompt tuning"),
    ("granite", "lora, peft's targets"),
    ("roformer", "lora"),
    ("jetmoe", "last layer"),
}
"""Points of each kind of architecture: dense, windows, experts, latent attention, recurrent, encoders, decoders."""
POINTS = [
    pytest.param(*point, id="-".join(point), marks=() if point in FAST else pytest.mark.slow) for point in EXPECTED
]


def test_table_covers_every_architecture_and_method() -> None:
    """At least 55 model types, and most plans are exact."""
    assert set(EXPECTED) == {(case, method) for case in CASES for method in METHODS}
    assert len({case.split(",")[0] for case in CASES}) >= 55
    assert list(EXPECTED.values()).count(EXACT) == 486
    assert {case for (case, _), outcome in EXPECTED.items() if outcome == UNPLANNED} == {
        "jetmoe",
        "megatron-bert",
        "rembert",
        "roformer",
    }


def test_fast_points_cover_every_method_and_outcome() -> None:
    """Each method and each outcome is in the fast tests; the other points are slow."""
    assert set(EXPECTED) >= FAST
    assert {method for _, method in FAST} == set(METHODS)
    assert {EXPECTED[point] for point in FAST} == set(EXPECTED.values())


@pytest.mark.parametrize(("case", "method"), POINTS)
def test_plan_equals_the_run_or_is_refused(  # noqa: PLR0917 — fixtures
    case: str,
    method: str,
    workshop: Workshop,
    sources: dict[str, Files],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    """Live bytes are equal, or the message names the module or the architecture."""
    folder = write_tiny_config(case, tmp_path / "base", tokenizer)
    outcome, reason = compare_run_and_plan(workshop, sources["max_length"], folder, METHODS[method])
    assert outcome == EXPECTED[case, method]
    if outcome == UNPLANNED:
        assert "cannot be simulated without tensor values" in reason
    elif outcome != EXACT:
        assert case.split(",", maxsplit=1)[0] in reason


GPUS = (("a10g", "bf16", "free"), ("t4", "fp16", "max_length"), ("h100", "bf16", "max_length"))
FAST_ON_GPUS = ("deepseek_v3", "mixtral", "qwen3", "falcon")
GPU_POINTS = [
    pytest.param(case, *gpu, marks=() if case in FAST_ON_GPUS else pytest.mark.slow) for case in CASES for gpu in GPUS
]


@pytest.mark.parametrize(("case", "device", "precision", "padding"), GPU_POINTS)
def test_plan_for_a_gpu_is_made_or_refused(  # noqa: PLR0917 — fixtures
    case: str,
    device: str,
    precision: str,
    padding: str,
    workshop: Workshop,
    sources: dict[str, Files],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    """The kernels of three generations of GPUs; some architectures cannot pack rows."""
    folder = write_tiny_config(case, tmp_path / "base", tokenizer)
    refusal: PeftbenchError | None = None
    try:
        plan_on_gpu(workshop, sources["max_length"], folder, device=device, precision=precision, padding=padding)
    except (EstimateUnavailableError, OutOfRangeError, UnsupportedModelError) as error:
        refusal = error
    if padding == "free" and isinstance(refusal, OutOfRangeError):
        assert "this model cannot keep their attention separate" in str(refusal)
    else:
        assert (refusal is None) == (EXPECTED[case, "lora"] == EXACT)
