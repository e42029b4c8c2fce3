"""Each optimizer uses its options, has the state bytes of its closed form, and names its missing library."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from peftbench.distributed.engines import SINGLE
from peftbench.distributed.sharding import state_bytes
from peftbench.errors import OptimizerError
from peftbench.optim import OPTIMIZERS, AdamW8bit, AdamW8bitBf16, AdamWBf16, Optimizer
from peftbench.optim.roles import ParameterRoles

OPTIMIZER_CLASSES: dict[str, Any] = dict(OPTIMIZERS)
ON_CPU = [
    pytest.param(
        name, marks=pytest.mark.slow if kind.is_cpu_only else ()
    )  # DeepSpeed compiles its optimizer for minutes
    for name, kind in sorted(OPTIMIZERS.items())
    if not kind.is_paged
    and not kind.freezes_blocks  # see test_lisa.py
    and not kind.needs_lora  # see test_lora_plus.py and test_lora_fa.py
]
ADAMW = [
    one
    for one in ON_CPU
    if one.values[0] in {"adamw", "adamw32bit", "adamw8bit", "deepspeed_cpu_adam", "adamw8bit_bf16"}
]
EXTRA_KEYS: dict[str, dict[str, object]] = {
    "galore": {"rank": 8},
    "apollo": {"rank": 8},
    "sgd": {"momentum": 0.9},
}
RATE, DECAY = 1e-3, 0.1


class Small(nn.Module):
    """An embedding, a matrix of whole quantization blocks, a matrix smaller than a block, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.large = nn.Linear(64, 128, bias=False)
        self.odd = nn.Linear(64, 3)


def run_steps(kind: Optimizer, steps: int = 1) -> tuple[Small, list[torch.Tensor], torch.optim.Optimizer]:
    """Return a model after some steps with known gradients, its parameters before them, and its optimizer."""
    torch.manual_seed(1)
    model = Small()
    if kind.weight_dtype == "bf16":
        model.to(torch.bfloat16)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    weight = model.embedding.weight
    assert isinstance(weight, nn.Parameter)
    optimizer = kind.build(list(model.parameters()), ParameterRoles(embeddings=(weight,)))
    kind.on_prepared(optimizer.param_groups)
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    for _ in range(steps):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return model, before, optimizer


@pytest.mark.parametrize("name", ON_CPU)
def test_state_classes_name_every_class_of_a_state(name: str) -> None:
    """A checkpoint restores objects of these classes only, in addition to tensors and numbers."""
    kind = OPTIMIZER_CLASSES[name](learning_rate=RATE, **EXTRA_KEYS.get(name, {}))
    _, _, optimizer = run_steps(kind)
    classes = {type(value) for state in optimizer.state.values() for value in state.values()}
    others = classes - {torch.Tensor, int, float, bool, type(None)}
    assert {one.__name__: one.__module__ for one in others} == dict(kind.state_classes)


@pytest.mark.parametrize("name", ON_CPU)
def test_state_bytes_match_closed_form(name: str) -> None:
    """Equal to the byte after one step; 8-bit states take less than 32-bit ones."""
    kind = OPTIMIZER_CLASSES[name](learning_rate=RATE, **EXTRA_KEYS.get(name, {}))
    model, _, optimizer = run_steps(kind)
    measured = state_bytes(SINGLE, model, optimizer, kind, "cpu")
    assert measured is not None
    assert measured.optimizer == measured.expected_optimizer
    assert measured.optimizer > 0
    if "8bit" in name:  # the embedding, half of the parameters, has 32-bit states
        assert measured.optimizer < 0.75 * 8 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ADAMW)
def test_adamw_first_step_matches_closed_form(name: str) -> None:
    """Weights shrink by rate x decay, and move by the rate against the gradient's sign."""
    kind = OPTIMIZER_CLASSES[name](learning_rate=RATE, weight_decay=DECAY)
    model, before, _ = run_steps(kind)
    generator = torch.Generator().manual_seed(2)
    for parameter, old in zip(model.parameters(), before, strict=True):
        gradient = torch.randn(parameter.shape, generator=generator)
        expected = old.float() * (1 - RATE * DECAY) - RATE * gradient.sign()
        error = (parameter.detach().float() - expected).abs()
        if kind.weight_dtype == "bf16":  # rounded to a neighboring number of 8 significant bits
            assert (error <= expected.abs() * 2**-7 + 1e-6).all()
        else:
            assert float(error.median()) < 1e-7
            assert float((error > 1e-5).float().mean()) < 0.02  # eps or 8-bit rounding matters for gradients near zero


@pytest.mark.parametrize("name", ON_CPU)
def test_options_reach_the_library(name: str) -> None:
    """Twice the learning rate gives larger steps; weight decay reduces the norm."""
    keys = EXTRA_KEYS.get(name, {})
    (slow, before, _), (fast, _, _), (decayed, _, _) = (
        run_steps(OPTIMIZER_CLASSES[name](learning_rate=rate, weight_decay=decay, **keys), steps=2)
        for rate, decay in ((1e-2, 0.0), (2e-2, 0.0), (1e-2, 0.9))
    )

    def compute_distance(model: Small) -> float:
        return float(sum((p.detach() - b).float().norm() for p, b in zip(model.parameters(), before, strict=True)))

    assert compute_distance(fast) > 1.2 * compute_distance(slow)
    norms = {id(m): float(m.embedding.weight.detach().float().norm()) for m in (slow, decayed)}
    assert norms[id(decayed)] < norms[id(slow)] * 0.995


@pytest.mark.parametrize("kind", [AdamW8bit, AdamW8bitBf16], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("in_32bit", [True, False])
def test_embedding_states_are_32_bit_by_default(kind: type[Any], in_32bit: bool) -> None:
    """The dtype of the first moment is compared; another matrix always has 8-bit states."""
    model, _, optimizer = run_steps(kind(learning_rate=RATE, embeddings_32bit=in_32bit))
    assert kind().embeddings_32bit is True

    def count_state_bits(parameter: torch.Tensor) -> int:
        state = optimizer.state[parameter]
        moment = state.get("state1", state.get("exp_avg"))
        if hasattr(moment, "__tensor_flatten__"):
            moment = getattr(moment, moment.__tensor_flatten__()[0][0])
        return int(moment.element_size()) * 8

    assert count_state_bits(model.embedding.weight) == (32 if in_32bit else 8)
    assert count_state_bits(model.large.weight) == 8


def test_stochastic_rounding_keeps_small_steps() -> None:
    """A step of 1 % of bf16's resolution is lost in rounding to nearest; stochastic rounding keeps it on average."""
    parameter = nn.Parameter(torch.ones(200, 200, dtype=torch.bfloat16))
    rate, steps = 2**-7 / 100, 50
    optimizer = AdamWBf16(learning_rate=rate).build([parameter])
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    change = 1 - float(parameter.detach().float().mean())
    assert change == pytest.approx(rate * steps, rel=0.05)
    assert float(torch.tensor(1.0, dtype=torch.bfloat16) - rate) == 1.0


@pytest.mark.parametrize(("name", "rank"), [("galore", 8), ("apollo", 64)])
def test_rank_of_an_update(name: str, rank: int) -> None:
    """GaLore steps in the projected space; APOLLO scales each row of the full gradient."""
    model, before, _ = run_steps(OPTIMIZER_CLASSES[name](learning_rate=1e-2, rank=8))
    update = before[1] - model.large.weight.detach()
    values = torch.linalg.svdvals(update)
    assert int((values > 1e-4 * values[0]).sum()) == rank
    if name == "apollo":
        generator = torch.Generator().manual_seed(2)
        gradients = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
        scales = (update / gradients[1]).median(dim=1, keepdim=True).values
        assert torch.allclose(update, scales * gradients[1], atol=1e-7)


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("galore", "pytorch_optimizer"),
        ("apollo", "apollo_torch"),
        ("adamw_bf16", "torchao.optim"),
        ("schedule_free", "schedulefree"),
        ("adamw8bit_bf16", "torchao.optim"),
    ],
)
def test_missing_library_is_named(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra to install."""
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        OptimizerError, match=rf"optimizer\.kind={name} needs .*install peftbench\[(optimizers|apollo)\]"
    ):
        OPTIMIZER_CLASSES[name]().build([nn.Parameter(torch.ones(2, 2))])
