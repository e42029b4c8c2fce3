"""LoRA-FA freezes LoRA's A and projects the gradient of B."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, lorafa
from safetensors.torch import load_file
from torch import nn
from transformers import OlmoeConfig

from peftbench.errors import OptimizerError
from peftbench.memory.devices import UNKNOWN_DEVICE
from peftbench.memory.lower_bound import measure_tensors
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.methods import METHOD_KINDS
from peftbench.methods.lora import Lora
from peftbench.optim import LoraFA
from peftbench.optim.lora_fa_adamw import INVERSE_KEY, compute_inverse
from peftbench.optim.lora_roles import LoraPair, find_lora_pairs
from peftbench.optim.roles import find_roles
from peftbench.recipe.schema import Profile
from tests.helpers.models import random_base
from tests.helpers.training import trainable_parameters
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RATE = 1e-2


def apply_seeded(method: Lora, base: PreTrainedModel) -> nn.Module:
    """Return the adapted model with the same initial values at each call."""
    torch.manual_seed(0)
    return method.apply(base, None)  # type: ignore[arg-type]


def build_pair(rows: int, columns: int, scaling: float = 2.0) -> LoraPair:
    """Return a random pair for a matrix with these outputs and inputs, of rank 4."""
    generator = torch.Generator().manual_seed(0)
    a = nn.Parameter(torch.randn((4, columns), generator=generator), requires_grad=False)
    b = nn.Parameter(torch.randn((rows, 4), generator=generator))
    return LoraPair("layer", a, b, scaling, is_embedding=False, variant=None)


def test_update_is_the_nearest_to_the_full_gradient() -> None:
    """``scaling`` times the projected gradient times A is the full gradient's least-squares fit over the rows of A."""
    pair = build_pair(6, 9)
    gradient = torch.randn((6, 9), generator=torch.Generator().manual_seed(1))
    projected = (pair.scaling * gradient @ pair.a.T) @ compute_inverse(pair)  # the chain rule gives B's gradient
    fit = torch.linalg.lstsq(pair.a.T, gradient.T).solution.T
    assert torch.allclose(pair.scaling * projected @ pair.a, fit @ pair.a, atol=1e-5)


def test_rank_above_the_inputs_gives_a_pseudoinverse() -> None:
    """If A has fewer columns than rows, A A^T is singular; its pseudoinverse is finite."""
    pair = build_pair(6, 2)
    gram = pair.scaling**2 * pair.a @ pair.a.T
    inverse = compute_inverse(pair)
    assert torch.allclose(gram @ inverse @ gram, gram, atol=1e-4)
    assert float(inverse.abs().max()) < 10


@pytest.mark.parametrize("use_rslora", [False, True])
def test_weights_equal_those_of_peft(
    use_rslora: bool, fresh_base: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After four steps, weights differ by at most 1e-6 of their norm. eps is tiny, since peft scales it differently."""
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    method = Lora(r=4, lora_alpha=8, use_rslora=use_rslora)
    ours, theirs = (apply_seeded(method, fresh_base("llama_untied")) for _ in range(2))
    kind = LoraFA(learning_rate=RATE, eps=1e-12)
    kind.prepare_model(ours)
    optimizer = kind.build(list(trainable_parameters(ours).values()), find_roles(ours))
    reference = create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=RATE)  # type: ignore[arg-type]
    reference.param_groups[0]["eps"] = kind.eps
    trained, expected = trainable_parameters(ours), trainable_parameters(theirs)
    assert {name for name in trained if "lora_B" in name} == set(trained) == {n for n in expected if "lora_B" in n}
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        for name, parameter in trained.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            expected[name].grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
    values = {name: parameter.detach() for name, parameter in theirs.named_parameters()}
    for name, parameter in trained.items():
        assert float((parameter.detach() - values[name]).norm()) < 1e-6 * float(values[name].norm()), name


def test_other_parameters_are_stepped_by_adamw(fresh_base: Callable[[str], PreTrainedModel]) -> None:
    """DoRA's magnitudes move by the learning rate against the sign of their gradient."""
    dora: Any = METHOD_KINDS["dora"]
    model = dora(r=4).apply(fresh_base("llama_untied"), None)
    kind = LoraFA(learning_rate=RATE)
    kind.prepare_model(model)
    trained = trainable_parameters(model)
    optimizer = kind.build(list(trained.values()), find_roles(model))
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    gradients = {name: torch.randn_like(parameter) for name, parameter in trained.items()}
    for name, parameter in trained.items():
        parameter.grad = gradients[name].clone()
    optimizer.step()
    magnitudes = [name for name in trained if "magnitude" in name]
    assert magnitudes
    assert len(magnitudes) * 2 == len(trained)
    for name in magnitudes:
        assert torch.allclose(before[name] - trained[name], RATE * gradients[name].sign(), atol=1e-6)
    assert kind.state_bytes(optimizer.param_groups) == sum(
        tensor.numel() * tensor.element_size() for state in optimizer.state.values() for tensor in state.values()
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_run_trains_b_alone(precision: str, workshop: Workshop) -> None:
    """Counts, FLOPs, states and plan are those of B; the saved adapter also contains A."""
    plain, ours = (
        workshop.recipe(
            Lora(r=4),
            name=name,
            optimizer={"kind": name, "learning_rate": RATE},
            train={"steps": 3, "precision": precision},
            data={"padding": "max_length"},
            save_model=True,
            profile=Profile(untimed_steps=2),
        )
        for name in ("adamw", "lora_fa")
    )
    reference, record = workshop.run(plain), workshop.run(ours)
    assert record.parameters is not None
    assert reference.parameters is not None
    assert record.parameters.added_frozen is not None
    assert record.parameters.trainable + record.parameters.added_frozen == reference.parameters.trainable
    counted = record.flops.counted_step
    assert counted is not None
    assert counted.counted_flops == counted.closed_form_flops
    assert record.flops.model_flops is not None
    assert reference.flops.model_flops is not None
    assert record.flops.model_flops < reference.flops.model_flops
    assert record.state_bytes is not None
    assert record.state_bytes.optimizer == record.state_bytes.expected_optimizer
    assert measure_tensors(ours).trained_bytes == 4 * record.parameters.trainable
    saved, other = (
        load_file(workshop.output / name / "model" / "adapter_model.safetensors") for name in ("lora_fa", "adamw")
    )
    assert saved.keys() == other.keys()
    assert record.parameters.added_frozen == sum(t.numel() for name, t in saved.items() if "lora_A" in name)
    assert any(float(tensor.abs().max()) > 0 for name, tensor in saved.items() if "lora_B" in name)
    assert record.step_losses[0] == reference.step_losses[0]


def test_plan_has_the_flops_of_the_run_and_smaller_activations(workshop: Workshop) -> None:
    """The input of A is not stored for the backward pass."""
    parts: dict[str, Any] = {"data": {"padding": "max_length"}, "train": {"steps": 1, "logits": "all"}}
    plain, ours = (
        workshop.recipe(Lora(r=4), name=name, optimizer={"kind": name}, **parts) for name in ("adamw", "lora_fa")
    )
    peaks = []
    for recipe in (plain, ours):
        size = (recipe.train.global_batch_size, recipe.data.max_length or 0, 1)
        with MemorySimulation(recipe, UNKNOWN_DEVICE.capability, 1) as simulation:
            simulation.simulate_training(*size)
            flops = simulation.step_flops(*size)
        peaks.append(simulation.memory_tracker.find_peak().bytes_by_category["activations"])
    assert peaks[1] < peaks[0]
    assert flops == workshop.run(ours).flops.hardware_flops


def test_inverse_is_computed_once(fresh_base: Callable[[str], PreTrainedModel]) -> None:
    """It is part of B's state, and later steps do not compute it again."""
    model = Lora(r=4).apply(fresh_base("llama_untied"), None)  # type: ignore[arg-type]
    kind = LoraFA(learning_rate=RATE)
    kind.prepare_model(model)
    trained = trainable_parameters(model).values()
    optimizer = kind.build(list(trained), find_roles(model))
    for step in range(2):
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for pair in find_lora_pairs(model):
            inverse = optimizer.state[pair.b][INVERSE_KEY]
            assert torch.equal(inverse, compute_inverse(pair) if step == 0 else torch.eye(4))
            optimizer.state[pair.b][INVERSE_KEY] = torch.eye(4)


def test_adapted_embedding_is_refused(fresh_base: Callable[[str], PreTrainedModel]) -> None:
    """Peft starts A of an embedding at zero, so that a frozen A would train nothing."""
    model = Lora(r=4, target_modules=("q_proj", "embed_tokens")).apply(fresh_base("llama_untied"), None)  # type: ignore[arg-type]
    with pytest.raises(OptimizerError, match=r"zero for the embedding .*embed_tokens; leave it out of method\.target"):
        LoraFA().prepare_model(model)


def test_stacked_experts_are_refused() -> None:
    """The matrices of all experts share one A, and the inverse is that of a single product B A."""
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        eos_token_id=0,
    )
    model = Lora(r=2).apply(random_base(config), None)  # type: ignore[arg-type]
    with pytest.raises(OptimizerError, match=r"one matrix A and one B in each .* peft adapts .*mlp.* ParamWrapper"):
        LoraFA().prepare_model(model)
    attention = Lora(r=2, target_modules=("q_proj",)).apply(random_base(config), None)  # type: ignore[arg-type]
    LoraFA().prepare_model(attention)
    assert all("lora_B" in name for name in trainable_parameters(attention))
