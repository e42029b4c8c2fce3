"""Methods on a base model in 4 or 8 bits (QLoRA): which of them train, and which are refused."""

from __future__ import annotations

import pytest
import torch

from peftbench.distributed.accelerator import build_accelerator
from peftbench.errors import CombinationError
from peftbench.methods.base import Method
from peftbench.modeling.loss import LabeledLogitsLoss, build_loss
from peftbench.training.build import load_base_model
from tests.helpers.methods import ONE_OF_EACH
from tests.helpers.sweeps import mark_others_slow
from tests.helpers.workshop import Workshop

SUPPORTED = {name: method for name, method in ONE_OF_EACH.items() if method.supports_quantized_base}


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("nf4_double", marks=pytest.mark.slow), "int8"])
@pytest.mark.parametrize("method", mark_others_slow(SUPPORTED, "lora"))
def test_supported_methods_train_on_a_quantized_base(method: Method, quantization: str, workshop: Workshop) -> None:
    """The loss decreases, weights take fewer bytes, and parameters and model FLOPs equal those of a float32 base."""
    plain, quantized = (
        workshop.run(workshop.recipe(method, model={"quantization": bits}, train={"steps": 8, "micro_batch_size": 3}))
        for bits in (None, quantization)
    )
    assert quantized.outcome.kind == "ok"
    assert min(quantized.step_losses[-2:]) < quantized.step_losses[0]
    assert quantized.step_losses == pytest.approx(plain.step_losses, rel=0.05)
    assert plain.state_bytes is not None
    assert quantized.state_bytes is not None
    assert quantized.state_bytes.weights < plain.state_bytes.weights
    rounds = any("the int8 base model rounds its matmul inputs to fp16" in note for note in quantized.notes)
    assert rounds == (quantization == "int8")
    assert (quantized.parameters, quantized.flops.model_flops) == (plain.parameters, plain.flops.model_flops)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_build_loss_does_not_modify_a_quantized_base(quantization: str, workshop: Workshop) -> None:
    """Forward passes that probe the model change neither the packed weights nor any attribute of a layer."""
    base = load_base_model(workshop.recipe(ONE_OF_EACH["lora"], model={"quantization": quantization})).model
    base.get_submodule(next(name for name, _ in base.named_modules() if name.endswith("mlp"))).train()
    before = [dict(vars(module)) for module in base.modules()]
    weights = [(parameter, parameter.data_ptr(), parameter.detach().clone()) for parameter in base.parameters()]
    loss, _ = build_loss(base)
    assert isinstance(loss, LabeledLogitsLoss)
    vars(loss.head).pop("forward")
    for module, attributes in zip(base.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is value for name, value in attributes.items())
    assert all(weight.data_ptr() == address and torch.equal(weight, copy) for weight, address, copy in weights)


@pytest.mark.parametrize("name", sorted(set(ONE_OF_EACH) - set(SUPPORTED)))
def test_methods_that_train_base_weights_are_refused(name: str, workshop: Workshop) -> None:
    """The error is raised before the base model is loaded."""
    recipe = workshop.recipe(ONE_OF_EACH[name], model={"quantization": "nf4"})
    with pytest.raises(
        CombinationError, match=r"trains weights of the base model; use model\.quantization=null, or method\.kind=lora"
    ):
        build_accelerator(recipe, workshop.output)


@pytest.mark.parametrize("quantization", ["nf4", "nf4_double"])
def test_evaluation_computes_what_training_does(quantization: str, workshop: Workshop) -> None:
    """The packed weights and the logits do not depend on the mode, on any CPU."""
    base = load_base_model(workshop.recipe(ONE_OF_EACH["lora"], model={"quantization": quantization})).model
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = base.train()(input_ids=ids).logits
        before = [parameter.clone() for parameter in base.parameters()]
        assert torch.equal(base.eval()(input_ids=ids).logits, expected)
    assert all(torch.equal(old, new) for old, new in zip(before, base.parameters(), strict=True))
