"""The book of storages: known tensors in their kinds, and its peak against torch's own allocator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from peftbench.methods.base import Method
from peftbench.profiler.memory_breakdown import MEMORY_CATEGORIES, EngineBuffers, MemoryTracker
from tests.helpers.batches import labels_of, mask_of, micro_batch
from tests.helpers.methods import every_architecture, every_method
from tests.helpers.training import trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS, WIDTH, OUT, VOCABULARY = 1000, 300, 200, 5000
FLOAT = 4


@dataclass
class Step:
    """One step of training, in its three parts."""

    model: nn.Module
    loss: Callable[[nn.Module], torch.Tensor]
    optimizer: torch.optim.Optimizer = field(init=False)
    part: str | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(p for p in self.model.parameters() if p.requires_grad)

    def __call__(self) -> None:
        self.part = "forward"
        loss = self.loss(self.model)
        self.part = "backward"
        loss.backward()  # type: ignore[no-untyped-call]
        self.part = "optimizer"
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.part = None

    def booked(self, vocabulary: int) -> MemoryTracker:
        """The book of one step."""
        book = MemoryTracker(self.model, self.optimizer, vocabulary, lambda: self.part)
        with book:
            self()
        return book


def bytes_of(*tensors: torch.Tensor) -> int:
    """Their sizes, added up."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def two_layers(inputs: torch.Tensor) -> Step:
    """Two linear layers with a ReLU between, without biases, whose loss is the sum of their outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, OUT, bias=False), nn.ReLU(), nn.Linear(OUT, VOCABULARY, bias=False))
    step = Step(model, lambda module: module(inputs).float().sum())
    step()
    return step


def test_tensors_of_known_size() -> None:
    """Weights, gradients, states, activation and logits of two linear layers, to the last byte."""
    step = two_layers(torch.ones(ROWS, WIDTH))
    peak = step.booked(VOCABULARY).find_peak()
    weights = (WIDTH * OUT + OUT * VOCABULARY) * FLOAT
    counters = 2 * FLOAT  # AdamW's number of steps, for each weight
    assert peak.bytes_by_category["weights"] == weights
    assert peak.bytes_by_category["optimizer_state"] == 2 * weights + counters
    # The sum's gradient is one number, expanded, so that nothing backward is as large as the logits.
    assert (peak.step_part, peak.operation) == ("forward", "aten.sum.default")
    assert peak.bytes_by_category["logits"] == ROWS * VOCABULARY * FLOAT
    assert peak.bytes_by_category["activations"] == ROWS * OUT * FLOAT + FLOAT  # the ReLU's output, and the loss
    assert peak.bytes_by_category["gradients"] == 0
    assert sum(peak.bytes_by_category.values()) == peak.nbytes


def test_gradients_are_gradients() -> None:
    """In a model whose states outweigh its activations, the peak is in the optimizer, with all gradients there."""
    step = two_layers(torch.ones(1, WIDTH))
    peak = step.booked(VOCABULARY).find_peak()
    assert peak.step_part == "optimizer"
    assert peak.bytes_by_category["gradients"] == (WIDTH * OUT + OUT * VOCABULARY) * FLOAT
    assert peak.bytes_by_category["activations"] == FLOAT  # the loss
    assert peak.bytes_by_category["logits"] == 0


def test_copies_of_weights_are_told_from_activations() -> None:
    """Autocast keeps a bf16 copy of each weight until the forward pass ends; the inputs' copy is an activation."""
    inputs = torch.ones(ROWS, WIDTH)

    def loss(module: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return functional.relu(module(inputs)).sum()  # type: ignore[no-any-return]

    step = Step(nn.Sequential(nn.Linear(WIDTH, OUT, bias=False), nn.Linear(OUT, OUT, bias=False)), loss)
    step()
    peak = step.booked(VOCABULARY).find_peak()
    assert peak.bytes_by_category["weight_copies"] == (WIDTH * OUT + OUT * OUT) * 2
    assert peak.bytes_by_category["logits"] == 0


def test_what_is_released_leaves_the_book() -> None:
    """A tensor that is gone before the next is made does not add to it."""

    def loss(module: nn.Module) -> torch.Tensor:
        for _ in range(5):
            torch.ones(1_000_000)
        return module(torch.ones(1, 1)).sum()  # type: ignore[no-any-return]

    step = Step(nn.Linear(1, 1), loss)
    step()
    peak = step.booked(VOCABULARY).find_peak()
    assert 1_000_000 * FLOAT <= peak.nbytes < 1_001_000 * FLOAT
    assert peak.bytes_by_category["temporaries"] == 1_000_000 * FLOAT
    assert (peak.operation, peak.step_part) == ("aten.ones.default", "forward")


def test_a_step_that_raises_is_booked_until_then() -> None:
    """The book survives what ends the step, and leaves no hook behind."""

    def loss(_: nn.Module) -> torch.Tensor:
        torch.ones(1_000_000)
        raise ZeroDivisionError

    step = Step(nn.Linear(1, 1), loss)
    book = MemoryTracker(step.model, step.optimizer, VOCABULARY, lambda: step.part)
    with pytest.raises(ZeroDivisionError), book:
        step()
    assert book.find_peak().nbytes >= 1_000_000 * FLOAT
    assert not any(p._post_accumulate_grad_hooks for p in step.model.parameters())


def allocated_peak(step: Step, held: int) -> int:
    """Most bytes that torch's own allocator had given out during one step, beyond ``held`` at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    total, peak = held, held
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


@every_architecture
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@every_method
def test_the_peak_is_that_of_torch_s_allocator(  # noqa: PLR0917
    method: Method,
    bf16: bool,
    checkpointing: bool,
    architecture: str,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """For every method the book's peak is what torch allocated, within what kernels take and release inside."""
    base = fresh_base(architecture)
    model = method.apply(base, tokenizer).train()
    if checkpointing and not method.has_frozen_backbone:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = micro_batch([(40, 5)] * 6, virtual=method.virtual_tokens)
    mask, labels = mask_of(batch), labels_of(batch, method.virtual_tokens)

    def loss(module: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = module(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits
        return functional.cross_entropy(logits[:, -40:-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    step = Step(model, loss)
    step()
    states = [t for state in step.optimizer.state.values() for t in state.values()]
    held = [t.untyped_storage() for t in (*model.parameters(), *model.buffers(), *states)]
    kept = {storage._cdata: storage.nbytes() for storage in held}
    inputs = bytes_of(batch.input_ids, mask, labels)
    peak = step.booked(base.config.vocab_size).find_peak()
    assert peak.nbytes == pytest.approx(allocated_peak(step, sum(kept.values()) + inputs), rel=0.01)
    assert sum(peak.bytes_by_category.values()) == peak.nbytes
    assert set(peak.bytes_by_category) == set(MEMORY_CATEGORIES)
    assert peak.bytes_by_category["logits"] >= 6 * 39 * base.config.vocab_size * FLOAT
    assert peak.bytes_by_category["gradients"] <= bytes_of(*trained(model).values())


def test_every_kind_is_named() -> None:
    """A reader finds each kind in the class's description."""
    described: Any = MemoryTracker.__doc__
    assert len(MEMORY_CATEGORIES) == 9
    assert [kind for kind in MEMORY_CATEGORIES if kind not in described] == []


def test_a_storage_that_gives_its_memory_back_and_stays() -> None:
    """As fully_shard's whole weights do: what they are for is known again when they come back."""
    model = nn.Linear(WIDTH, OUT)
    whole = nn.Parameter(torch.zeros(VOCABULARY))
    storage, size = whole.untyped_storage(), VOCABULARY * FLOAT
    storage.resize_(0)
    book = MemoryTracker(
        model,
        torch.optim.SGD(model.parameters()),
        VOCABULARY,
        lambda: "forward",
        get_engine_buffers=lambda: EngineBuffers(gathered=[whole]),
    )
    with book:
        for _ in range(2):
            storage.resize_(size)
            whole * 2
            storage.resize_(0)
    sizes = [
        (event.nbytes, event.is_allocation, event.category) for event in book.iter_events() if event.nbytes == size
    ]
    lives = [(made, kind) for _, made, kind in sizes if kind == "gathered_weights"]
    assert lives == [(True, "gathered_weights"), (False, "gathered_weights")] * 2
    assert book.find_peak().bytes_by_category["gathered_weights"] == size
    assert "resized" not in torch.UntypedStorage.resize_.__qualname__


def test_what_an_engine_holds_and_what_lies_elsewhere() -> None:
    """Tensors in the kind it gives them, bytes of which there is no tensor, and nothing of another device."""
    model = nn.Linear(WIDTH, OUT)
    master, away = torch.zeros(ROWS), torch.empty(ROWS, device="meta")
    held = EngineBuffers([("optimizer_state", master), ("weights", away)], untracked_bytes=[("buckets", 12345)])
    book = MemoryTracker(
        model,
        torch.optim.SGD(model.parameters()),
        VOCABULARY,
        lambda: "forward",
        get_engine_buffers=lambda: held,
        device_type="cpu",
    )
    with book:
        model(torch.zeros(1, WIDTH))
    kinds = book.find_peak().bytes_by_category
    assert (kinds["buckets"], kinds["optimizer_state"]) == (12345, ROWS * FLOAT)
    assert kinds["weights"] == bytes_of(*model.parameters())
