"""Optimizer steps change exactly the trained parameters of a method, whose number matches the closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peftbench.methods import METHODS
from peftbench.training.loop import train_step
from tests.conformance.battery import CASES, RATES, REFUSED, VARIANTS, Case, MakeBench, every_case, every_variant
from tests.helpers.batches import micro_batch, one_batch
from tests.helpers.methods import ONE_OF_EACH, PRESETS
from tests.helpers.models import ARCHITECTURES, meta_base
from tests.helpers.training import assemble_training, loss_for, summed_loss, trainable_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator


def test_battery_covers_every_method() -> None:
    """Every method has variants, and every variant is combined with each architecture that it does not refuse."""
    assert METHODS
    assert ARCHITECTURES
    assert set(VARIANTS) == set(METHODS) == set(RATES) == {case.method.kind for case in CASES}
    assert {kind: type(method) for kind, method in (ONE_OF_EACH | PRESETS).items()} == METHODS  # used by other tests
    assert all(variants for variants in VARIANTS.values())
    assert all(type(m) is METHODS[kind] for kind, variants in VARIANTS.items() for m in variants.values())
    variants = [variant for kind in VARIANTS.values() for variant in kind]
    assert len(CASES) == len(variants) * len(ARCHITECTURES) - len(REFUSED)


@every_variant
def test_steps_change_exactly_the_trained_parameters(
    case: Case, make_bench: MakeBench, accelerator: Accelerator
) -> None:
    """Every tensor that requires a gradient changes, and all others stay bit-identical."""
    bench = make_bench(case)
    trainer = assemble_training(accelerator, bench.model, bench.optimizer)
    before = {name: tensor.detach().clone() for name, tensor in bench.named_tensors().items()}
    # Two steps: in the first, LoRA's B is zero, so that A has no gradient.
    for _ in range(2):
        train_step(accelerator, trainer, one_batch(micro_batch(virtual=case.method.virtual_tokens)), max_grad_norm=1.0)
    changed = {name for name, tensor in bench.named_tensors().items() if not torch.equal(tensor, before[name])}
    assert changed == set(trainable_parameters(bench.model))
    assert changed


@every_case
def test_frozen_part_has_no_trained_parameter_and_no_dropout(case: Case, make_bench: MakeBench) -> None:
    """Its hidden states can be cached. Any other backbone has a trained parameter or is in training mode."""
    bench = make_bench(case)
    part, backbone = case.method.get_frozen_part(bench.model), bench.base.base_model
    modules = part.list_modules(bench.base)
    assert bool(modules) is not part.is_empty
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert not any(child.training for module in modules for child in module.modules())
    has_trained_parameter = any(parameter.requires_grad for parameter in backbone.parameters())
    has_training_mode = any(module.training for module in backbone.modules())
    assert part.is_backbone is not (has_trained_parameter or has_training_mode)
    assert part.is_backbone or not case.method.has_frozen_backbone
    assert part.is_empty or case.method.supports_feature_cache


@every_case
def test_method_states_whether_the_base_stays_frozen(case: Case, make_bench: MakeBench) -> None:
    """``keeps_base_frozen`` is True for exactly the methods that add parameters; these train no matrix of it."""
    base_names = dict(meta_base(ARCHITECTURES[case.architecture]()).named_parameters(remove_duplicate=False))
    trained = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in trainable_parameters(make_bench(case).model).items()
    }
    assert case.method.keeps_base_frozen is not (trained.keys() <= base_names.keys())
    if case.method.keeps_base_frozen:
        assert {name for name, parameter in trained.items() if parameter.dim() > 1}.isdisjoint(base_names)


@every_case
def test_trainable_count_matches_closed_form(case: Case, make_bench: MakeBench) -> None:
    """The closed form uses shapes without weights; it equals the number of scalars that require a gradient."""
    counted = sum(parameter.numel() for parameter in trainable_parameters(make_bench(case).model).values())
    assert counted == case.method.trainable_parameters(meta_base(ARCHITECTURES[case.architecture]()))
    assert counted > 0


@every_case
def test_trained_weights_are_float32(case: Case, make_bench: MakeBench) -> None:
    """Each parameter that the optimizer updates is in float32."""
    assert {parameter.dtype for parameter in trainable_parameters(make_bench(case).model).values()} == {torch.float32}


@every_variant
def test_loss_depends_on_exactly_the_trained_parameters(case: Case, make_bench: MakeBench) -> None:
    """The leaves of the loss's autograd graph are the trained parameters."""
    bench = make_bench(case)
    loss = summed_loss(bench.model, micro_batch(virtual=case.method.virtual_tokens))
    leaves, pending, visited = set(), [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        leaves |= {id(node.variable)} if hasattr(node, "variable") else set()
        pending += [parent for parent, _ in node.next_functions]
    assert leaves == {id(parameter) for parameter in trainable_parameters(bench.model).values()}


@every_case
def test_backward_pass_ends_at_a_frozen_backbone(case: Case, make_bench: MakeBench) -> None:
    """The head's input requires a gradient only if a parameter below the head is trained or added."""
    bench = make_bench(case)
    loss = loss_for(bench.model)
    needs_gradient: list[bool] = []
    head = bench.base.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: needs_gradient.append(inputs[0].requires_grad))
    loss(bench.model, micro_batch(virtual=case.method.virtual_tokens))
    head_ids = {id(parameter) for parameter in head.parameters()}
    trained_below = [p for p in trainable_parameters(bench.model).values() if id(p) not in head_ids]
    is_tied = head.weight is bench.base.get_input_embeddings().weight and head.weight.requires_grad
    assert needs_gradient == [bool(trained_below) or is_tied]
    assert not (case.method.has_frozen_backbone and needs_gradient[0])
