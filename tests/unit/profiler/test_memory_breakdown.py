"""MemoryTracker: categories of known tensors, and its peak compared with torch's allocator."""

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
from peftbench.modeling.activation_checkpointing import enable_checkpointing
from peftbench.profiler.memory_breakdown import MEMORY_CATEGORIES, EngineBuffers, MemoryTracker
from tests.helpers.batches import labels_of, mask_of, micro_batch
from tests.helpers.methods import ONE_OF_EACH
from tests.helpers.models import ARCHITECTURES
from tests.helpers.sweeps import mark_slow
from tests.helpers.training import trainable_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS, WIDTH, OUT, VOCABULARY = 1000, 300, 200, 5000
FLOAT = 4


@dataclass
class Step:
    """One training step in three parts."""

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

    def track(self, vocabulary: int) -> MemoryTracker:
        """Return the tracker of one step."""
        tracker = MemoryTracker(self.model, self.optimizer, vocabulary, lambda: self.part)
        with tracker:
            self()
        return tracker


def bytes_of(*tensors: torch.Tensor) -> int:
    """Return the total bytes of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def build_two_layer_step(inputs: torch.Tensor) -> Step:
    """Return a step of two linear layers without biases, with a ReLU in between; the loss is the sum of outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, OUT, bias=False), nn.ReLU(), nn.Linear(OUT, VOCABULARY, bias=False))
    step = Step(model, lambda module: module(inputs).float().sum())
    step()
    return step


def test_categories_of_known_tensors() -> None:
    """Weights, states, activations and logits of two linear layers, to the byte."""
    step = build_two_layer_step(torch.ones(ROWS, WIDTH))
    peak = step.track(VOCABULARY).find_peak()
    weights = (WIDTH * OUT + OUT * VOCABULARY) * FLOAT
    counters = 2 * FLOAT  # AdamW's step counter per weight
    assert peak.bytes_by_category["weights"] == weights
    assert peak.bytes_by_category["optimizer_state"] == 2 * weights + counters
    # The gradient of the sum is one expanded number, so the backward pass needs less than the logits.
    assert (peak.step_part, peak.operation) == ("forward", "aten.sum.default")
    assert peak.bytes_by_category["logits"] == ROWS * VOCABULARY * FLOAT
    assert peak.bytes_by_category["activations"] == ROWS * OUT * FLOAT + FLOAT  # the ReLU's output, and the loss
    assert peak.bytes_by_category["gradients"] == 0
    assert sum(peak.bytes_by_category.values()) == peak.nbytes


def test_gradients_at_the_optimizer_peak() -> None:
    """With small activations the peak is in the optimizer, with all gradients live."""
    step = build_two_layer_step(torch.ones(1, WIDTH))
    peak = step.track(VOCABULARY).find_peak()
    assert peak.step_part == "optimizer"
    assert peak.bytes_by_category["gradients"] == (WIDTH * OUT + OUT * VOCABULARY) * FLOAT
    assert peak.bytes_by_category["activations"] == FLOAT  # the loss
    assert peak.bytes_by_category["logits"] == 0


def test_weight_copies_are_not_activations() -> None:
    """Autocast caches a bf16 copy of each weight until the forward pass ends; the inputs' copy is an activation."""
    inputs = torch.ones(ROWS, WIDTH)

    def loss(module: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return functional.relu(module(inputs)).sum()  # type: ignore[no-any-return]

    step = Step(nn.Sequential(nn.Linear(WIDTH, OUT, bias=False), nn.Linear(OUT, OUT, bias=False)), loss)
    step()
    peak = step.track(VOCABULARY).find_peak()
    assert peak.bytes_by_category["weight_copies"] == (WIDTH * OUT + OUT * OUT) * 2
    assert peak.bytes_by_category["logits"] == 0


def test_released_tensors_do_not_count() -> None:
    """A tensor that is freed before the next allocation does not add to the peak."""

    def loss(module: nn.Module) -> torch.Tensor:
        for _ in range(5):
            torch.ones(1_000_000)
        return module(torch.ones(1, 1)).sum()  # type: ignore[no-any-return]

    step = Step(nn.Linear(1, 1), loss)
    step()
    peak = step.track(VOCABULARY).find_peak()
    assert 1_000_000 * FLOAT <= peak.nbytes < 1_001_000 * FLOAT
    assert peak.bytes_by_category["temporaries"] == 1_000_000 * FLOAT
    assert (peak.operation, peak.step_part) == ("aten.ones.default", "forward")


def test_step_that_raises_is_tracked_up_to_the_error() -> None:
    """The events are kept and all hooks are removed."""

    def loss(_: nn.Module) -> torch.Tensor:
        torch.ones(1_000_000)
        raise ZeroDivisionError

    step = Step(nn.Linear(1, 1), loss)
    tracker = MemoryTracker(step.model, step.optimizer, VOCABULARY, lambda: step.part)
    with pytest.raises(ZeroDivisionError), tracker:
        step()
    assert tracker.find_peak().nbytes >= 1_000_000 * FLOAT
    assert not any(p._post_accumulate_grad_hooks for p in step.model.parameters())


def measure_allocator_peak(step: Step, start_bytes: int) -> int:
    """Return the peak of torch's allocator during one step, starting from ``start_bytes``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    total = peak = start_bytes
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


@pytest.mark.parametrize(
    ("method", "bf16", "checkpointing", "architecture"),
    mark_slow(
        [
            (method, bf16, checkpointing, architecture)
            for method in ONE_OF_EACH.values()
            for bf16 in (False, True)
            for checkpointing in (False, True)
            for architecture in ARCHITECTURES
        ],
        lambda point: point[3] == "llama_untied" and point[1] == point[2],
        seed=6,
    ),
)
def test_peak_equals_torch_allocator_peak(  # noqa: PLR0917
    method: Method,
    bf16: bool,
    checkpointing: bool,
    architecture: str,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """They are equal within 1 %, the memory that kernels allocate and free internally."""
    base = fresh_base(architecture)
    model = method.apply(base, tokenizer).train()
    if checkpointing and not method.has_frozen_backbone:
        enable_checkpointing(base)
    batch = micro_batch([(40, 5)] * 6, virtual=method.virtual_tokens)
    mask, labels = mask_of(batch), labels_of(batch, method.virtual_tokens)

    def loss(module: nn.Module) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = module(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits
        return functional.cross_entropy(logits[:, -40:-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    step = Step(model, loss)
    step()
    states = [t for state in step.optimizer.state.values() for t in state.values()]
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers(), *states)]
    nbytes_by_storage = {storage._cdata: storage.nbytes() for storage in storages}
    inputs = bytes_of(batch.input_ids, mask, labels)
    peak = step.track(base.config.vocab_size).find_peak()
    assert peak.nbytes == pytest.approx(
        measure_allocator_peak(step, sum(nbytes_by_storage.values()) + inputs), rel=0.01
    )
    assert sum(peak.bytes_by_category.values()) == peak.nbytes
    assert set(peak.bytes_by_category) == set(MEMORY_CATEGORIES)
    assert peak.bytes_by_category["logits"] >= 6 * 39 * base.config.vocab_size * FLOAT
    assert peak.bytes_by_category["gradients"] <= bytes_of(*trainable_parameters(model).values())


def test_every_category_is_documented() -> None:
    """The class docstring describes each category."""
    docstring: Any = MemoryTracker.__doc__
    assert len(MEMORY_CATEGORIES) == 9
    assert [category for category in MEMORY_CATEGORIES if category not in docstring] == []


def test_resized_storage_keeps_its_category() -> None:
    """E.g. the unsharded weights of fully_shard, which are resized to 0 and back."""
    model = nn.Linear(WIDTH, OUT)
    unsharded = nn.Parameter(torch.zeros(VOCABULARY))
    storage, size = unsharded.untyped_storage(), VOCABULARY * FLOAT
    storage.resize_(0)
    tracker = MemoryTracker(
        model,
        torch.optim.SGD(model.parameters()),
        VOCABULARY,
        lambda: "forward",
        get_engine_buffers=lambda: EngineBuffers(gathered=[unsharded]),
    )
    with tracker:
        for _ in range(2):
            storage.resize_(size)
            unsharded * 2
            storage.resize_(0)
    sizes = [
        (event.nbytes, event.is_allocation, event.category) for event in tracker.iter_events() if event.nbytes == size
    ]
    gathered = [(is_allocation, kind) for _, is_allocation, kind in sizes if kind == "gathered_weights"]
    assert gathered == [(True, "gathered_weights"), (False, "gathered_weights")] * 2
    assert tracker.find_peak().bytes_by_category["gathered_weights"] == size
    assert "tracked_resize" not in torch.UntypedStorage.resize_.__qualname__


def test_engine_buffers_and_other_devices() -> None:
    """Engine buffers keep their category, untracked bytes count, and other devices do not."""
    model = nn.Linear(WIDTH, OUT)
    master, on_meta = torch.zeros(ROWS), torch.empty(ROWS, device="meta")
    buffers = EngineBuffers([("optimizer_state", master), ("weights", on_meta)], untracked_bytes=[("buckets", 12345)])
    tracker = MemoryTracker(
        model,
        torch.optim.SGD(model.parameters()),
        VOCABULARY,
        lambda: "forward",
        get_engine_buffers=lambda: buffers,
        device_type="cpu",
    )
    with tracker:
        model(torch.zeros(1, WIDTH))
    kinds = tracker.find_peak().bytes_by_category
    assert (kinds["buckets"], kinds["optimizer_state"]) == (12345, ROWS * FLOAT)
    assert kinds["weights"] == bytes_of(*model.parameters())
