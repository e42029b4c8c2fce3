"""A training step on the meta device, through the very loop that trains: nothing is computed, every storage is booked.

Two steps are made, and the second is looked at: there the optimizer's states are. What is booked are the bytes that torch
would ask the device's allocator for, in the order of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftbench.budget.steering import DeviceKind, Steering
from peftbench.data.batches import Batches, Collator, GlobalBatch, MicroBatch, TokenCounts
from peftbench.engine.bind import Bound
from peftbench.engine.build import Trainer, build
from peftbench.engine.engines import SINGLE
from peftbench.engine.loop import train_step
from peftbench.models import architecture
from peftbench.profiler.breakdown import Breakdown, Peak

if TYPE_CHECKING:
    from peftbench.recipe import Recipe

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Rehearsal:
    """What a step would hold."""

    book: Breakdown
    """Of both steps, marked at the second."""

    @property
    def peak(self) -> Peak:
        """The moment when most bytes are held."""
        return self.book.peak()


@dataclass
class _StandIn:
    """As much of an Accelerator as a step needs, for one process and no device."""

    gradient_accumulation_steps: int
    num_processes: int = 1
    process_index: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("meta"))
    scaler: None = None
    optimizer_step_was_skipped: bool = False

    def accumulate(self, _model: nn.Module) -> AbstractContextManager[None]:
        """Nothing is held back."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """As an Accelerator's, which divides by the number of micro-batches."""
        if self.gradient_accumulation_steps > 1:
            loss = loss / self.gradient_accumulation_steps
        loss.backward()  # type: ignore[no-untyped-call]

    def clip_grad_norm_(self, parameters: Iterator[nn.Parameter], max_norm: float) -> None:
        """As an Accelerator's."""
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def reduce(self, _tensor: torch.Tensor) -> torch.Tensor:
        """A number, where the meta device has none."""
        return torch.zeros(())


@dataclass
class _Parts:
    """Which part of a step is being done."""

    current: str | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Do ``name``."""
        self.current = name
        try:
            yield
        finally:
            self.current = None


def rehearse(recipe: Recipe, device: DeviceKind, rows: int, width: int, micro_batches: int) -> Rehearsal:
    """The second step of ``recipe`` on one device of this kind, over ``micro_batches`` of (rows, width) tokens.

    Raises:
        ModelError: the architecture is not known, or needs values that the meta device does not have.
    """
    bound = Bound(_StandIn(micro_batches), SINGLE, recipe.train.precision)  # type: ignore[arg-type]
    base = architecture(recipe.model)
    built = build(recipe, base, bound)
    steering = Steering(device, _PRECISIONS.get(recipe.train.precision), padded=rows > 1)
    model = built.bare_model
    if built.checkpointing:
        again: Callable[[], Any] = lambda: (nullcontext(), steering.again())  # noqa: E731
        base.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": again})
    if device == "cpu":
        _bring_plain_tensors(model)
    recipe.method.set_training(model)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = recipe.optimizer.build(trained, [p for p in trained if id(p) in embeddings])
    recipe.optimizer.started(optimizer.param_groups)
    _cast_forward(model, steering)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = Trainer(model, optimizer, schedule, _no_batches(), 2)
    parts = _Parts()
    book = Breakdown(model, optimizer, base.model.config.vocab_size, lambda: parts.current)
    # On the CPU a batch is there already, and to a GPU it is copied.
    batches = [_batch(rows, width, micro_batches, "meta" if device == "cpu" else "cpu") for _ in range(2)]
    with book, steering.helpers(), steering:
        train_step(bound.accelerator, trainer, batches.pop(), recipe.train.max_grad_norm, parts.part)
        book.mark()
        train_step(bound.accelerator, trainer, batches.pop(), recipe.train.max_grad_norm, parts.part)
    return Rehearsal(book)


def _cast_forward(model: nn.Module, steering: Steering) -> None:
    """As an Accelerator prepares a model for autocast: the forward pass inside of it, its outputs in float32."""
    from accelerate.utils import convert_outputs_to_fp32

    if steering.precision is None:
        return
    forward = model.forward

    def cast(*given: Any, **named: Any) -> Any:
        with steering.autocast():
            return forward(*given, **named)

    model.forward = convert_outputs_to_fp32(cast)


def _bring_plain_tensors(model: nn.Module) -> None:
    """Put tensors that a method keeps outside of parameters and buffers on the meta device, as if they were there.

    From the CPU to the CPU they are not copied; to a GPU they are, at every use.
    """
    for values in vars(model).values():
        if isinstance(values, dict):
            values.update({key: value.to("meta") for key, value in values.items() if isinstance(value, torch.Tensor)})


def _batch(rows: int, width: int, micro_batches: int, device: str) -> GlobalBatch:
    def tokens() -> torch.Tensor:
        return torch.zeros((rows, width), dtype=torch.long, device=device)

    made = tuple(MicroBatch(tokens(), tokens(), tokens()) for _ in range(micro_batches))
    return GlobalBatch(made, TokenCounts(labelled=1))


def _no_batches() -> Batches:
    return Batches([], Collator(0), 1, 1, 0)  # type: ignore[arg-type]
