"""LoRA+ steps LoRA's B at a multiple of A's learning rate, in the groups of peft's own function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from peftbench.distributed.accelerator import build_accelerator
from peftbench.errors import CombinationError, OptimizerError
from peftbench.methods import METHOD_KINDS
from peftbench.methods.base import Method
from peftbench.methods.baselines import ZeroShot
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.optim import AdamW, LoraPlus
from peftbench.optim.lora_roles import find_lora_pairs
from peftbench.optim.roles import find_roles
from tests.helpers.training import build_training_components, trainable_parameters
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RATE, RATIO, DECAY = 1e-3, 8.0, 0.1
METHODS: dict[str, tuple[str, Method]] = {
    "lora": ("llama_untied", Lora(r=4)),
    "embedding": ("llama_untied", Lora(r=4, target_modules=("q_proj", "embed_tokens"))),
    "biases": ("gpt2_tied", Lora(r=4, bias="all")),
    "dora": ("llama_untied", METHOD_KINDS["dora"](r=4)),  # type: ignore[call-arg]
}
"""Methods with all kinds of parameters that peft groups: embeddings, biases, norms and DoRA's magnitudes."""


def apply_with_noise(method: Method, base: PreTrainedModel) -> nn.Module:
    """Return the adapted model, with nonzero values in each trained parameter."""
    torch.manual_seed(0)
    model = method.apply(base, None)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def step_repeatedly(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make four steps with known gradients."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        for parameter in trainable_parameters(model).values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", METHODS)
def test_groups_and_weights_equal_those_of_peft(name: str, fresh_base: Callable[[str], PreTrainedModel]) -> None:
    """Each parameter has the same learning rate and decay, and after four steps the same values, to the last bit."""
    architecture, method = METHODS[name]
    ours, theirs = (apply_with_noise(method, fresh_base(architecture)) for _ in range(2))
    kind = LoraPlus(learning_rate=RATE, learning_rate_ratio=RATIO, weight_decay=DECAY, embedding_learning_rate=1e-5)
    optimizer = kind.build(list(trainable_parameters(ours).values()), find_roles(ours))
    reference = create_loraplus_optimizer(
        theirs,  # type: ignore[arg-type]
        torch.optim.AdamW,
        lr=RATE,
        loraplus_lr_ratio=RATIO,
        loraplus_weight_decay=DECAY,
        loraplus_lr_embedding=1e-5,
        betas=kind.betas,
        eps=kind.eps,
        fused=True,
    )
    rates = [
        {
            key: (group["lr"], group["weight_decay"])
            for key, parameter in trainable_parameters(model).items()
            for group in one.param_groups
            if any(parameter is member for member in group["params"])
        }
        for model, one in ((ours, optimizer), (theirs, reference))
    ]
    assert rates[0] == rates[1]
    assert len(set(rates[0].values())) >= 2
    assert rates[0].keys() == trainable_parameters(ours).keys()
    before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(ours).items()}
    step_repeatedly(ours, optimizer)
    step_repeatedly(theirs, reference)
    expected = trainable_parameters(theirs)
    for key, parameter in trainable_parameters(ours).items():
        assert torch.equal(parameter, expected[key]), key
        assert not torch.equal(parameter, before[key]), key


def test_groups_contain_each_trained_parameter_once(workshop: Workshop) -> None:
    """The first group, whose learning rate is logged, is that of A; one schedule scales all rates."""
    recipe = workshop.recipe(
        Lora(r=4), optimizer=LoraPlus(learning_rate=RATE), schedule={"kind": "constant", "warmup_steps": 2}
    )
    accelerator = build_accelerator(recipe, workshop.output).accelerator
    training = build_training_components(recipe, accelerator)
    pairs = find_lora_pairs(training.model)
    groups = training.optimizer.param_groups
    assert [{id(p) for p in group["params"]} for group in groups] == [
        {id(pair.a) for pair in pairs},
        {id(pair.b) for pair in pairs},
    ]
    training.optimizer.step()
    training.lr_scheduler.step()
    assert [group["lr"] for group in groups] == pytest.approx([RATE / 2, 16 * RATE / 2])
    assert training.lr_scheduler.get_last_lr()[0] == pytest.approx(RATE / 2)


def test_note_has_both_rates_and_states_have_their_closed_form(workshop: Workshop) -> None:
    """Parameters and FLOPs are those of LoRA with AdamW."""
    plain, ours = (
        workshop.run(workshop.recipe(Lora(r=4), name=kind.kind, train={"steps": 1}, optimizer=kind))
        for kind in (AdamW(), LoraPlus(learning_rate=RATE, learning_rate_ratio=4))
    )
    assert "the peak learning rate of lora_plus is 0.001 for A and 0.004 for B; trackers log that of A" in ours.notes
    assert ours.parameters == plain.parameters
    assert ours.flops == plain.flops
    assert ours.state_bytes is not None
    assert ours.state_bytes.optimizer == ours.state_bytes.expected_optimizer


def ia3() -> Method:
    """Return a method of peft without the matrices of LoRA."""
    return METHOD_KINDS["ia3"]()  # type: ignore[call-arg]


@pytest.mark.parametrize("optimizer", ["lora_plus", "lora_fa"])
@pytest.mark.parametrize("build", [Full, ia3], ids=["full", "ia3"])
def test_method_without_lora_is_refused(optimizer: str, build: Callable[[], Method], workshop: Workshop) -> None:
    """The error names the method, the kinds that work and an optimizer that does."""
    method = build()
    with pytest.raises(
        CombinationError,
        match=rf"method\.kind={method.kind}.*needs the matrices A and B of LoRA.*: lora, .*use optimizer\.kind=adamw",
    ):
        build_accelerator(workshop.recipe(method, optimizer={"kind": optimizer}), workshop.output)


@pytest.mark.parametrize("optimizer", ["lora_plus", "lora_fa"])
def test_method_that_trains_a_alone_is_refused(optimizer: str, workshop: Workshop) -> None:
    """MiCA freezes B."""
    method: Any = METHOD_KINDS["mica"]
    recipe = workshop.recipe(method(r=4), architecture="llama_untied", optimizer={"kind": optimizer})
    with pytest.raises(OptimizerError, match=r"trains the matrix B of LoRA, but this method does not; use method"):
        workshop.run(recipe)


def test_baseline_of_a_suite_runs(workshop: Workshop) -> None:
    """A suite may set one optimizer for all recipes; a baseline trains nothing."""
    record = workshop.run(workshop.recipe(ZeroShot(), optimizer={"kind": "lora_plus"}))
    assert record.outcome.kind == "ok"
