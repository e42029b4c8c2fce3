"""Compiled blocks give the same losses as eager ones."""

from __future__ import annotations

import pytest

from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.recipe.schema import Profile
from tests.helpers.workshop import Workshop


@pytest.mark.slow
@pytest.mark.parametrize("method", [Full(), Lora(r=4)], ids=lambda method: method.kind)
def test_compiled_losses_match_eager_losses(method: Method, workshop: Workshop) -> None:
    """In float32, to six digits. No step's FLOPs are counted: the counter does not see inside compiled blocks."""
    from torch._dynamo.utils import counters

    counters.clear()
    plain, compiled = (
        workshop.run(
            workshop.recipe(
                method,
                name=f"compile-{compiled}",
                train={"compile": compiled, "steps": 5},
                profile=Profile(untimed_steps=1),
            )
        )
        for compiled in (False, True)
    )
    assert compiled.step_losses == pytest.approx(plain.step_losses, rel=1e-6)
    assert compiled.flops.hardware_flops == plain.flops.hardware_flops
    assert plain.flops.counted_step is not None
    assert compiled.flops.counted_step is None
    assert counters["stats"]["unique_graphs"] > 0
