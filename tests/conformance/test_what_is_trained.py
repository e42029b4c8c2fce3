"""Every method trains exactly what it says, and says how much that is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peftbench.methods import METHODS
from peftbench.training.loop import train_step
from tests.conformance.battery import CASES, RATES, REFUSED, VARIANTS, Case, MakeBench, every_case
from tests.helpers.batches import micro_batch, one_batch
from tests.helpers.methods import ONE_OF_EACH
from tests.helpers.models import ARCHITECTURES, meta_base
from tests.helpers.training import loss_for, summed_loss, trained, trainer_of

if TYPE_CHECKING:
    from accelerate import Accelerator


def test_battery_covers_every_method() -> None:
    """The battery has a row for every method, each row meets every architecture that it does not refuse."""
    assert METHODS
    assert ARCHITECTURES
    assert set(VARIANTS) == set(METHODS) == set(RATES) == {case.method.kind for case in CASES}
    assert {kind: type(method) for kind, method in ONE_OF_EACH.items()} == METHODS  # what other tests run through
    assert all(variants for variants in VARIANTS.values())
    assert all(type(m) is METHODS[kind] for kind, variants in VARIANTS.items() for m in variants.values())
    variants = [variant for kind in VARIANTS.values() for variant in kind]
    assert len(CASES) == len(variants) * len(ARCHITECTURES) - len(REFUSED)


@every_case
def test_trains_exactly_what_it_says(case: Case, make_bench: MakeBench, accelerator: Accelerator) -> None:
    """After optimizer steps, every tensor that requires a gradient has changed, and all others are the same bits."""
    bench = make_bench(case)
    trainer = trainer_of(accelerator, bench.model, bench.optimizer)
    before = {name: tensor.detach().clone() for name, tensor in bench.everything().items()}
    # Two steps: at the first, LoRA's one factor is zero and gives the other no gradient.
    for _ in range(2):
        train_step(accelerator, trainer, one_batch(micro_batch(virtual=case.method.virtual_tokens)), max_grad_norm=1.0)
    changed = {name for name, tensor in bench.everything().items() if not torch.equal(tensor, before[name])}
    assert changed == set(trained(bench.model))
    assert changed


@every_case
def test_a_trunk_that_is_said_to_be_frozen_is(case: Case, make_bench: MakeBench) -> None:
    """Nothing in it is trained or dropped out, so what it gives can be kept; any other gets a gradient."""
    trunk = make_bench(case).base.base_model
    trained_there = any(parameter.requires_grad for parameter in trunk.parameters())
    dropping = any(module.training for module in trunk.modules())
    assert case.method.has_frozen_backbone is not (trained_there or dropping)


@every_case
def test_trainable_count_is_the_closed_form(case: Case, make_bench: MakeBench) -> None:
    """The closed form, from shapes without weights, equals the number of scalars that require a gradient."""
    counted = sum(parameter.numel() for parameter in trained(make_bench(case).model).values())
    assert counted == case.method.trainable_parameters(meta_base(ARCHITECTURES[case.architecture]()))
    assert counted > 0


@every_case
def test_trained_weights_are_float32(case: Case, make_bench: MakeBench) -> None:
    """What an optimizer steps is in float32."""
    assert {parameter.dtype for parameter in trained(make_bench(case).model).values()} == {torch.float32}


@every_case
def test_loss_depends_on_what_is_trained_and_on_nothing_else(case: Case, make_bench: MakeBench) -> None:
    """The leaves of the loss's graph are the trained parameters: none is left out, and nothing is kept for others."""
    bench = make_bench(case)
    loss = summed_loss(bench.model, micro_batch(virtual=case.method.virtual_tokens))
    leaves, todo, seen = set(), [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaves |= {id(node.variable)} if hasattr(node, "variable") else set()
        todo += [parent for parent, _ in node.next_functions]
    assert leaves == {id(parameter) for parameter in trained(bench.model).values()}


@every_case
def test_trunk_frozen_says_where_the_backward_pass_ends(case: Case, make_bench: MakeBench) -> None:
    """The head's input has no gradient where the method says that its trunk is frozen, and one where it does not."""
    bench = make_bench(case)
    loss = loss_for(bench.model)
    needs_gradient: list[bool] = []
    head = bench.base.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: needs_gradient.append(inputs[0].requires_grad))
    loss(bench.model, micro_batch(virtual=case.method.virtual_tokens))
    assert needs_gradient == [not case.method.has_frozen_backbone]
