"""Operations of a step are recorded with exact shapes, FLOPs and bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn import functional

from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.timing.operations import extrapolate, sum_flops
from tests.helpers.workshop import Workshop
from tests.unit.timing.operation_logs import LABELS, ROWS, TOKENS, log_one, log_operations, meta, simulate

METHODS = (Full(), Lora(), PromptTuning(num_virtual_tokens=4), LastLayer())


def test_key_and_flops_of_a_product() -> None:
    """2mnk FLOPs; both factors are read and the result is written."""
    operation = log_one(lambda: torch.mm(meta(6, 40), meta(40, 10)))
    assert (operation.kind, operation.dims, operation.layout, operation.dtype) == (
        "product",
        (1, 6, 10, 40),
        "nn",
        "fp32",
    )
    assert operation.flops == 2 * 6 * 10 * 40
    assert operation.nbytes == 4 * (6 * 40 + 40 * 10 + 6 * 10)


@pytest.mark.parametrize(("left", "right", "layout"), [(False, True, "nt"), (True, False, "tn"), (True, True, "tt")])
def test_layout_of_transposed_factors(left: bool, right: bool, layout: str) -> None:
    """A transposed view of a matrix is named t, as the gradients of a linear layer need them."""
    first = meta(40, 6).t() if left else meta(6, 40)
    second = meta(10, 40).t() if right else meta(40, 10)
    assert log_one(lambda: torch.mm(first, second)).layout == layout


def test_batched_product_with_bias() -> None:
    """The bias and the batch are part of bytes and dims."""
    batched = log_one(lambda: torch.bmm(meta(3, 6, 40), meta(3, 40, 10)))
    assert (batched.dims, batched.flops) == ((3, 6, 10, 40), 3 * 2 * 6 * 10 * 40)
    added = log_one(lambda: torch.addmm(meta(10), meta(6, 40), meta(40, 10)))
    assert (added.dims, added.flops) == ((1, 6, 10, 40), 2 * 6 * 10 * 40)
    assert added.nbytes == 4 * (10 + 6 * 40 + 40 * 10 + 6 * 10)


def test_bytes_of_elementwise_operations() -> None:
    """Inputs are read once, results written once; an expanded dimension counts once."""
    values, half = meta(8, 32), meta(8, 32, dtype=torch.bfloat16)
    full = 8 * 32 * 4
    assert log_one(lambda: values + values).nbytes == 3 * full
    assert log_one(lambda: values + meta(32)).nbytes == 2 * full + 32 * 4
    assert log_one(lambda: values + meta(1, 32).expand(8, 32)).nbytes == 2 * full + 32 * 4
    assert log_one(lambda: values.mul_(2.0)).nbytes == 2 * full
    assert log_one(values.zero_).nbytes == full
    assert log_one(lambda: values.copy_(half)).nbytes == full + full // 2
    assert log_one(lambda: values.to(torch.bfloat16)).nbytes == full + full // 2
    assert log_one(lambda: functional.gelu(half)).nbytes == full


def test_bytes_of_gathers() -> None:
    """A lookup reads only the rows that it returns."""
    operation = log_one(lambda: functional.embedding(meta(6, dtype=torch.long), meta(1000, 16)))
    assert operation.nbytes == 2 * 6 * 16 * 4 + 6 * 8


def test_views_move_no_bytes() -> None:
    """Views and allocations are one key without bytes."""
    counts = log_operations(lambda: (meta(4, 6).t(), meta(4, 6).view(24)))
    assert {operation.kind for operation in counts} == {"metadata"}
    assert sum(operation.nbytes for operation in counts) == 0


def test_fused_optimizer_is_one_launch_and_one_key_per_shape() -> None:
    """AdamW reads weight, gradient and moments and writes weight and moments: 28 bytes a value."""
    parameters = [meta(8, 32) for _ in range(3)]
    gradients = [meta(8, 32) for _ in parameters]
    moments = [[meta(8, 32) for _ in parameters] for _ in range(2)]
    steps = [meta() for _ in parameters]
    keys: dict[str, Any] = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.0,
        "eps": 1e-8,
        "amsgrad": False,
        "maximize": False,
    }
    with torch.no_grad():
        counts = log_operations(
            lambda: torch._fused_adamw_(parameters, gradients, moments[0], moments[1], [], steps, **keys),
            part="optimizer",
        )
    assert sum(count for operation, count in counts.items() if operation.is_launched) == 1
    (tensor,) = [operation for operation in counts if not operation.is_launched]
    assert (tensor.kind, counts[tensor], tensor.nbytes) == ("optimizer", 3, 8 * 32 * 28 + 4)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
@pytest.mark.parametrize("device", ["cpu", "h200"])
def test_product_flops_equal_the_closed_form(method: Method, device: str, workshop: Workshop) -> None:
    """The products and the attention of a simulated step have exactly the plan's FLOPs."""
    precision = "fp32" if device == "cpu" else "bf16"
    recipe = workshop.recipe(method, train={"precision": precision, "global_batch_size": ROWS})
    simulation = simulate(recipe, device)
    expected = simulation.step_flops(ROWS, TOKENS, LABELS)
    assert expected is not None
    assert sum_flops(simulation.operation_log.count_step(1)) == expected


def test_later_micro_batches_repeat_the_last_simulated_one(workshop: Workshop) -> None:
    """Five micro-batches from two simulated ones: FLOPs are five times those of one, the optimizer runs once."""
    recipe = workshop.recipe(Full(), train={"global_batch_size": 5 * ROWS, "precision": "bf16"})
    log = simulate(recipe, "h200", accumulation=5).operation_log
    one, five = log.count_step(1), log.count_step(5)
    assert sum_flops(five) == 5 * sum_flops(one)
    optimizer = [Counter({key: n for key, n in step.items() if key.part == "optimizer"}) for step in (one, five)]
    assert optimizer[0] == optimizer[1]


def test_extrapolation_equals_a_deeper_model(workshop: Workshop) -> None:
    """The counts of a stack of equal layers follow from one and two layers less."""

    def stack(num_layers: int) -> Counter:  # type: ignore[type-arg]
        layers = [torch.nn.Linear(16, 16, device="meta") for _ in range(num_layers)]
        model = torch.nn.Sequential(*layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)

        def step() -> None:
            model(meta(4, 16)).sum().backward()
            optimizer.step()

        return log_operations(step)

    assert extrapolate(stack(3), stack(4), extra_units=5) == stack(9)
    assert extrapolate(stack(3), stack(4), extra_units=0) == stack(4)
