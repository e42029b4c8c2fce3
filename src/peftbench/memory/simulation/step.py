"""A training step on the meta device, through the very loop that trains: nothing is computed, every storage is booked.

What is booked are the bytes that torch would ask the device's allocator for, in the order of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from peftbench.memory.simulation.model import build_meta_model
from peftbench.memory.simulation.device import DeviceType, DeviceEmulation
from peftbench.memory.simulation.values import FakeScalars
from peftbench.memory.launch_config import SINGLE_PROCESS, LaunchConfig
from peftbench.data.batches import Batches, GlobalBatch, compute_micro_batching
from peftbench.data.collate import Collator, MicroBatch, TokenCounts
from peftbench.distributed.accelerator import AcceleratorContext
from peftbench.training.build import TrainingComponents, apply_method, build_collator, prepare_with_engine
from peftbench.distributed.deepspeed import unwrap_chain
from peftbench.distributed.engines import DDP
from peftbench.distributed.memory_owners import collect_engine_buffers
from peftbench.training.loop import train_step
from peftbench.modeling.activation_offload import ActivationOffload
from peftbench.distributed.sharding import unshard_root
from peftbench.errors import EstimateUnavailableError
from peftbench.common.libraries import imports_without_gc
from peftbench.profiler.memory_breakdown import MemoryTracker, EngineBuffers
from peftbench.profiler.flops import UnsupportedFlopsError, count_flops

if TYPE_CHECKING:
    from peftbench.recipe.schema import Recipe

LabelCounts = int | Sequence[int]
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class _FakeAccelerator:
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
class _StepPartTracker:
    """Which part of a step is being done."""

    steering: DeviceEmulation
    values: FakeScalars = field(default_factory=FakeScalars)
    current: str | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Do ``name``."""
        self.current, self.steering.any_number = name, name == "optimizer"
        self.values.on = name not in {"forward", "evaluate", "generate"}
        try:
            yield
        finally:
            self.current, self.steering.any_number, self.values.on = None, False, True


class MemorySimulation:
    """A recipe on the meta device, steered to what one device of a kind would do; a context in which all is booked.

    What needs values that the meta device does not have ends it with a NotEstimatedError that names the module.
    """

    def __init__(
        self, recipe: Recipe, device: DeviceType, micro_batches: int, *, padded: bool = True, world: LaunchConfig = SINGLE_PROCESS
    ) -> None:
        """``micro_batches`` of a step of one process; ``padded``: whether a batch has rows of unlike lengths.

        Raises:
            ModelError: the architecture is not known.
        """
        self.recipe, self.device, self.world = recipe, device, world
        self._inside: list[str] = []
        # From the second on all is as in the second, but that on the CPU their tokens were there before.
        self.micro_batches = min(micro_batches, 2) if device == "cuda" else micro_batches
        self.accelerator: Any = _FakeAccelerator(self.micro_batches)
        bound = AcceleratorContext(self.accelerator, world.engine, recipe.train.precision)
        self.steering = DeviceEmulation(device, _AUTOCAST_DTYPES.get(recipe.train.precision), padded=padded)
        with imports_without_gc():  # of the architecture's code, and of the method's library
            self.base = build_meta_model(recipe.model, _AUTOCAST_DTYPES.get(recipe.train.precision, torch.float32))
            with self._watched(), self.steering.helpers():
                built = apply_method(recipe, self.base, bound)
        self.model, self.loss = built.bare_model, built.loss
        self.collator = build_collator(recipe, built.loss, pad_token=0)
        self.checkpointing = built.checkpointing
        if built.checkpointing:
            again: Callable[[], Any] = lambda: (nullcontext(), self.steering.again())  # noqa: E731
            self.base.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": again})
        if device == "cpu":
            _move_plain_tensors_to_meta(self.model)
        self.parts = _StepPartTracker(self.steering)
        self.forward = self.model.forward
        self._contexts = ExitStack()
        self._watch(self.model)

    @property
    def positions(self) -> int | None:
        """Positions of the model, None where its config does not say."""
        return self.base.positions

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """While a method is applied to the base, whose loss is found out in forward passes."""
        hooks = self._watch(self.base.model)
        try:
            yield
        except BaseException as error:
            self._explain(error)
            raise
        finally:
            for hook in hooks:
                hook.remove()
            self._inside.clear()

    def _watch(self, model: nn.Module) -> list[Any]:
        """Know which module computes."""
        hooks: list[Any] = []
        for name, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda *_, entered=name: self._inside.append(entered)))
            hooks.append(module.register_forward_hook(self._left))
        return hooks

    def _left(self, *_: object) -> None:
        self._inside.pop()

    def __enter__(self) -> MemorySimulation:
        try:
            self._start()
        except BaseException as error:
            self._contexts.close()
            self._explain(error)
            raise
        for context in (self.steering.helpers(), self.recipe.optimizer.rehearsed(), self.steering):
            self._contexts.enter_context(context)
        return self

    def _start(self) -> None:
        """Put the model into its engine's hands."""
        schedule = partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)
        if self.world.alone:
            if self._offloads:  # what is kept in the CPU's memory is never written
                self._contexts.enter_context(self.parts.values)
            optimizer = self._optimizer()
            self.trainer = self._offloading(
                TrainingComponents(self.model, self.loss, optimizer, schedule(optimizer), _empty_batches(), 2)
            )
            self._look()
            return
        from peftbench.memory.simulation.process_group import fake_distributed

        asked = _build_single_step_recipe(self.recipe, self.micro_batches, self.world.processes)
        bound = self._contexts.enter_context(fake_distributed(asked, self.world, self.steering, self.parts.values))
        self.accelerator = bound.accelerator
        started, optimizer, bare = prepare_with_engine(asked, self.model, bound)
        self._fuse(list(unwrap_chain(optimizer))[-1])
        self.trainer = TrainingComponents(started, self.loss, optimizer, schedule(bare), _empty_batches(), 3)
        if not bound.engine_autocasts:
            self.trainer = replace(self.trainer, autocast=self.steering.autocast)
        if bound.engine.deepspeed:
            self.trainer = replace(self.trainer, backward_part="backward_and_optimizer")
        self.trainer = self._offloading(self.trainer)

    @property
    def _offloads(self) -> bool:
        """Whether activations go to the CPU's memory; on the CPU they are there."""
        return self.recipe.train.activation_offloading and self.device == "cuda"

    def _offloading(self, trainer: TrainingComponents) -> TrainingComponents:
        if not self._offloads:
            return trainer
        return replace(trainer, offload=partial(ActivationOffload, list(self.model.parameters()), "meta"))

    def _look(self) -> None:
        """Book from here on."""
        started, optimizer = self.trainer.model, self.trainer.optimizer
        self.book = MemoryTracker(
            self.model, optimizer, self.base.model.config.vocab_size, lambda: self.parts.current,
            holdings=lambda: EngineBuffers() if self.world.alone else collect_engine_buffers(started, self.model, optimizer),
            device="meta" if self.device == "cuda" else None,  # what lies in the CPU's memory is another's
        )  # fmt: skip
        self._contexts.enter_context(self.book)

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        self._contexts.close()
        self._explain(error)

    def _explain(self, error: BaseException | None) -> None:
        """Of an error that is of values which are not there; any other is a fault of the program, and goes on as it is.

        Raises:
            NotEstimatedError: with the module that asked for them.
        """
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
            raise EstimateUnavailableError(
                f"this machine has too few addresses for what {self.world.engine.name} keeps in the CPU's memory; ask "
                "one with more memory"
            ) from error
        if isinstance(error, (RuntimeError, NotImplementedError)) and "meta" in str(error).lower():
            where = self._inside[-1] if self._inside else None
            raise EstimateUnavailableError(
                f"{where or 'this recipe'} ({self.base.model.config.model_type}) cannot be rehearsed without values: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def train(self, rows: int, width: int, labels: LabelCounts) -> None:
        """Two steps over micro-batches of (rows, width) tokens; the book is marked at the second, where states are.

        The last ``labels`` tokens of each row are labelled, as many of each or a number for each, or all of them where
        the recipe says so.

        An engine of several processes makes one before them: in its first step it makes plans and buffers.
        """
        self.recipe.method.set_training(self.model)
        if self.world.alone or self.world.engine == DDP:
            _autocast_forward(self.model, self.steering)
        batches = [self._batch(rows, width, labels, self.micro_batches) for _ in range(self.trainer.steps)]
        with self.loss.in_use():
            if not self.world.alone:
                self._step(batches.pop())
                self._look()
            self._step(batches.pop())
            self.book.mark()
            self._step(batches.pop())

    def _step(self, batch: GlobalBatch) -> None:
        limit = self.recipe.train.max_grad_norm
        train_step(self.accelerator, self.trainer, batch, limit, self.parts.part)  # type: ignore[arg-type]

    def step_flops(self, rows: int, width: int, labels: int) -> int | None:
        """What a batch of (rows, width) tokens takes; None where it is not known."""
        work = self.collator.executed(self._micro_batch(rows, width, labels))
        self.recipe.method.set_training(self.model)
        try:
            with self.steering.helpers(), self.loss.in_use():
                found = count_flops(
                    self.model, self.base.model, virtual_tokens=self.recipe.method.virtual_tokens,
                    checkpointing=self.checkpointing, head_everywhere=self.loss.everywhere,
                )  # fmt: skip
        except UnsupportedFlopsError:
            return None
        except RuntimeError as error:
            self._explain(error)
            raise
        return found.executed(work)

    @torch.no_grad()
    def evaluate(self, rows: int, width: int, labels: int) -> None:
        """The held-out loss of one batch."""
        self.model.eval()
        self.steering.padded = rows > 1
        batch = self._batch(rows, width, labels, 1).micro_batches[0]
        with self.parts.part("evaluate"), self.steering.autocast(), self.loss.in_use():
            self.loss.by_token(self.model, batch.to(self.accelerator.device))

    @torch.no_grad()
    def generate(self, rows: int, width: int, new_tokens: int) -> None:
        """The last token of the longest summaries: keys and values of all before it are there.

        They are made in one pass, as those of the prompt are; with beams, ``rows`` are times those.
        """
        self.model.eval()
        self.steering.padded = rows > 1
        ids = torch.zeros((rows, width + new_tokens - 1), dtype=torch.long, device="meta")
        self.model.forward = self.forward
        whole = unshard_root(self.model) if self.world.engine.fsdp else nullcontext()
        with self.parts.part("generate"), self.steering.autocast(), whole:
            mask = torch.ones_like(ids)
            past = self.model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values
            mask = torch.ones((rows, past.get_seq_length() + 1), dtype=torch.long, device="meta")
            base = self.base.model
            base(input_ids=ids[:, :1], attention_mask=mask, past_key_values=past, use_cache=True, logits_to_keep=1)

    def _optimizer(self) -> torch.optim.Optimizer:
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        made = self.recipe.optimizer.build(trained, [p for p in trained if id(p) in embeddings])
        self.recipe.optimizer.started(made.param_groups)
        self._fuse(made)
        return made

    def _fuse(self, optimizer: torch.optim.Optimizer) -> None:
        """As an optimizer is that is built over weights which are there."""
        if type(optimizer) is torch.optim.AdamW:
            for group in optimizer.param_groups:
                group["fused"] = True

    def _batch(self, rows: int, width: int, labels: LabelCounts, micro_batches: int) -> GlobalBatch:
        made = tuple(self._micro_batch(rows, width, labels) for _ in range(micro_batches))
        return GlobalBatch(made, TokenCounts(labelled=1))

    def _micro_batch(self, rows: int, width: int, labels: LabelCounts) -> MicroBatch:
        of_rows = [labels] * rows if isinstance(labels, int) else labels
        # On the CPU a batch is there already, but to DDP and fully_shard, who call it "cpu:0"; to a GPU it is copied.
        there = self.device == "cpu" and (self.world.alone or self.world.engine.deepspeed)
        with _disable_current_modes():  # they come from elsewhere, and are booked once they are used
            made = self.collator.collate([[0] * width] * rows, [width - count for count in of_rows])
            return made.map(lambda tensor: tensor.to("meta")) if there else made


def _autocast_forward(model: nn.Module, steering: DeviceEmulation) -> None:
    """As an Accelerator prepares a model for autocast: the forward pass inside of it, its outputs in float32."""
    from accelerate.utils import convert_outputs_to_fp32

    if steering.precision is None:
        return
    forward = model.forward

    def cast(*given: Any, **named: Any) -> Any:
        with steering.autocast():
            return forward(*given, **named)

    model.forward = convert_outputs_to_fp32(cast)


def _move_plain_tensors_to_meta(model: nn.Module) -> None:
    """Put tensors that a method keeps outside of parameters and buffers on the meta device, as if they were there.

    From the CPU to the CPU they are not copied; to a GPU they are, at every use.
    """
    for values in vars(model).values():
        if isinstance(values, dict):
            values.update({key: value.to("meta") for key, value in values.items() if isinstance(value, torch.Tensor)})


def _build_single_step_recipe(recipe: Recipe, micro_batches: int, processes: int) -> Recipe:
    """The recipe with no more than these micro-batches in a step, as an engine is told.

    Casts are steered, so it hears of no precision.
    """
    _, rows = compute_micro_batching(recipe.train.global_batch_size, recipe.train.rows, processes)
    numbers = {
        "global_batch_size": rows * micro_batches * processes, "micro_batch_size": rows, "micro_batch_tokens": None,
        "precision": "fp32",
    }  # fmt: skip
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=numbers), "trackers": ()})


def _empty_batches() -> Batches:
    return Batches([], Collator(0), 1, 1, 0)  # type: ignore[arg-type]
