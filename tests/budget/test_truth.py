"""What a rehearsal books is what a real step on the CPU holds, to the byte."""

from __future__ import annotations

import pytest

from peftbench.budget.rehearsal import Rehearsal
from peftbench.methods.base import Method
from peftbench.recipe import Profile
from tests.conftest import Workshop, every_architecture, every_method

WIDTH = 48


@every_method
@every_architecture
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_real_step(
    method: Method, architecture: str, precision: str, checkpointing: bool, workshop: Workshop
) -> None:
    """Weights, gradients, states, activations, logits and temporaries: each as in the step that was really made."""
    recipe = workshop.recipe(
        method, architecture=architecture, data={"padding": "max_tokens", "max_tokens": WIDTH},
        train={"precision": precision, "gradient_checkpointing": checkpointing, "steps": 3, "global_batch": 6},
        profile=Profile(warmup_steps=2, breakdown=True),
    )  # fmt: skip
    found = workshop.run(recipe).breakdown
    assert found is not None
    with Rehearsal(recipe, "cpu", 1) as rehearsal:
        rehearsal.train(6, WIDTH)
    expected = rehearsal.book.peak()
    assert expected.bytes == pytest.approx(found.peak_bytes, rel=1e-6)
    assert expected.by_kind == found.bytes_by_kind
