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

from peftbench.common.libraries import imports_without_gc
from peftbench.data.batches import Batches, GlobalBatch, compute_micro_batching
from peftbench.data.collate import Collator, MicroBatch, TokenCounts
from peftbench.distributed.accelerator import AcceleratorContext
from peftbench.distributed.deepspeed import unwrap_optimizer
from peftbench.distributed.engines import DDP
from peftbench.distributed.memory_owners import collect_engine_buffers
from peftbench.distributed.sharding import unshard_root
from peftbench.errors import EstimateUnavailableError
from peftbench.memory.launch_config import SINGLE_PROCESS, LaunchConfig
from peftbench.memory.simulation.device import DeviceEmulation, DeviceType
from peftbench.memory.simulation.model import build_meta_model
from peftbench.memory.simulation.values import FakeScalars
from peftbench.modeling.activation_offload import ActivationOffload
from peftbench.profiler.flops import UnsupportedFlopsError, count_flops
from peftbench.profiler.memory_breakdown import EngineBuffers, MemoryTracker
from peftbench.training.build import TrainingComponents, apply_method, build_collator, prepare_with_engine
from peftbench.training.loop import train_step

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

    emulation: DeviceEmulation
    fake_scalars: FakeScalars = field(default_factory=FakeScalars)
    current_part: str | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Do ``name``."""
        self.current_part, self.emulation.allow_fake_scalars = name, name == "optimizer"
        self.fake_scalars.is_enabled = name not in {"forward", "evaluate", "generate"}
        try:
            yield
        finally:
            self.current_part, self.emulation.allow_fake_scalars, self.fake_scalars.is_enabled = None, False, True


class MemorySimulation:
    """A recipe on the meta device, steered to what one device of a kind would do; a context in which all is booked.

    What needs values that the meta device does not have ends it with a NotEstimatedError that names the module.
    """

    def __init__(
        self,
        recipe: Recipe,
        device_type: DeviceType,
        num_micro_batches: int,
        *,
        has_padding: bool = True,
        launch_config: LaunchConfig = SINGLE_PROCESS,
    ) -> None:
        """``micro_batches`` of a step of one process; ``padded``: whether a batch has rows of unlike lengths.

        Raises:
            ModelError: the architecture is not known.
        """
        self.recipe, self.device_type, self.launch_config = recipe, device_type, launch_config
        self._module_stack: list[str] = []
        # From the second on all is as in the second, but that on the CPU their tokens were there before.
        self.num_micro_batches = min(num_micro_batches, 2) if device_type == "cuda" else num_micro_batches
        self.accelerator: Any = _FakeAccelerator(self.num_micro_batches)
        bound = AcceleratorContext(self.accelerator, launch_config.engine, recipe.train.precision)
        self.emulation = DeviceEmulation(
            device_type, _AUTOCAST_DTYPES.get(recipe.train.precision), has_padding=has_padding
        )
        with imports_without_gc():  # of the architecture's code, and of the method's library
            self.loaded_model = build_meta_model(
                recipe.model, _AUTOCAST_DTYPES.get(recipe.train.precision, torch.float32)
            )
            with self._track_method_modules(), self.emulation.patch_libraries():
                built = apply_method(recipe, self.loaded_model, bound)
        self.model, self.loss = built.model, built.loss
        self.collator = build_collator(recipe, built.loss, pad_token_id=0)
        self.gradient_checkpointing = built.gradient_checkpointing
        if built.gradient_checkpointing:
            again: Callable[[], Any] = lambda: (nullcontext(), self.emulation.recompute())  # noqa: E731
            self.loaded_model.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": again})
        if device_type == "cpu":
            _move_plain_tensors_to_meta(self.model)
        self.step_parts = _StepPartTracker(self.emulation)
        self.original_forward = self.model.forward
        self._contexts = ExitStack()
        self._register_module_hooks(self.model)

    @property
    def max_positions(self) -> int | None:
        """Positions of the model, None where its config does not say."""
        return self.loaded_model.max_positions

    @contextmanager
    def _track_method_modules(self) -> Iterator[None]:
        """While a method is applied to the base, whose loss is found out in forward passes."""
        hooks = self._register_module_hooks(self.loaded_model.model)
        try:
            yield
        except BaseException as error:
            self._raise_if_value_dependent(error)
            raise
        finally:
            for hook in hooks:
                hook.remove()
            self._module_stack.clear()

    def _register_module_hooks(self, model: nn.Module) -> list[Any]:
        """Know which module computes."""
        hooks: list[Any] = []
        for name, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda *_, entered=name: self._module_stack.append(entered)))
            hooks.append(module.register_forward_hook(self._pop_module))
        return hooks

    def _pop_module(self, *_: object) -> None:
        self._module_stack.pop()

    def __enter__(self) -> MemorySimulation:
        try:
            self._prepare()
        except BaseException as error:
            self._contexts.close()
            self._raise_if_value_dependent(error)
            raise
        for context in (self.emulation.patch_libraries(), self.recipe.optimizer.meta_context(), self.emulation):
            self._contexts.enter_context(context)
        return self

    def _prepare(self) -> None:
        """Put the model into its engine's hands."""
        schedule = partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)
        if self.launch_config.is_single_process:
            if self._offloads_activations:  # what is kept in the CPU's memory is never written
                self._contexts.enter_context(self.step_parts.fake_scalars)
            optimizer = self._build_optimizer()
            self.training = self._with_activation_offload(
                TrainingComponents(self.model, self.loss, optimizer, schedule(optimizer), _empty_batches(), 2)
            )
            self._start_tracking()
            return
        from peftbench.memory.simulation.process_group import fake_distributed

        asked = _build_single_step_recipe(self.recipe, self.num_micro_batches, self.launch_config.num_processes)
        bound = self._contexts.enter_context(
            fake_distributed(asked, self.launch_config, self.emulation, self.step_parts.fake_scalars)
        )
        self.accelerator = bound.accelerator
        started, optimizer, bare = prepare_with_engine(asked, self.model, bound)
        self._enable_fused(unwrap_optimizer(optimizer))
        self.training = TrainingComponents(started, self.loss, optimizer, schedule(bare), _empty_batches(), 3)
        if not bound.engine_autocasts:
            self.training = replace(self.training, autocast=self.emulation.autocast)
        if bound.engine.is_deepspeed:
            self.training = replace(self.training, backward_part="backward_and_optimizer")
        self.training = self._with_activation_offload(self.training)

    @property
    def _offloads_activations(self) -> bool:
        """Whether activations go to the CPU's memory; on the CPU they are there."""
        return self.recipe.train.activation_offloading and self.device_type == "cuda"

    def _with_activation_offload(self, training: TrainingComponents) -> TrainingComponents:
        if not self._offloads_activations:
            return training
        return replace(training, activation_offload=partial(ActivationOffload, list(self.model.parameters()), "meta"))

    def _start_tracking(self) -> None:
        """Book from here on."""
        started, optimizer = self.training.model, self.training.optimizer
        self.memory_tracker = MemoryTracker(
            self.model,
            optimizer,
            self.loaded_model.model.config.vocab_size,
            lambda: self.step_parts.current_part,
            get_engine_buffers=lambda: (
                EngineBuffers()
                if self.launch_config.is_single_process
                else collect_engine_buffers(started, self.model, optimizer)
            ),
            device_type="meta" if self.device_type == "cuda" else None,  # what lies in the CPU's memory is another's
        )
        self._contexts.enter_context(self.memory_tracker)

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        self._contexts.close()
        self._raise_if_value_dependent(error)

    def _raise_if_value_dependent(self, error: BaseException | None) -> None:
        """Of an error that is of values which are not there; any other is a fault of the program, and goes on as it is.

        Raises:
            NotEstimatedError: with the module that asked for them.
        """
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
            raise EstimateUnavailableError(
                f"this machine has too few addresses for what {self.launch_config.engine.name} keeps in the CPU's memory; ask "
                "one with more memory"
            ) from error
        if isinstance(error, (RuntimeError, NotImplementedError)) and "meta" in str(error).lower():
            where = self._module_stack[-1] if self._module_stack else None
            raise EstimateUnavailableError(
                f"{where or 'this recipe'} ({self.loaded_model.model.config.model_type}) cannot be rehearsed without values: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def simulate_training(self, batch_size: int, sequence_length: int, labelled_tokens: LabelCounts) -> None:
        """Two steps over micro-batches of (rows, width) tokens; the book is marked at the second, where states are.

        The last ``labels`` tokens of each row are labelled, as many of each or a number for each, or all of them where
        the recipe says so.

        An engine of several processes makes one before them: in its first step it makes plans and buffers.
        """
        self.recipe.method.set_training(self.model)
        if self.launch_config.is_single_process or self.launch_config.engine == DDP:
            _autocast_forward(self.model, self.emulation)
        batches = [
            self._build_batch(batch_size, sequence_length, labelled_tokens, self.num_micro_batches)
            for _ in range(self.training.total_steps)
        ]
        with self.loss.attention_context():
            if not self.launch_config.is_single_process:
                self._run_step(batches.pop())
                self._start_tracking()
            self._run_step(batches.pop())
            self.memory_tracker.mark()
            self._run_step(batches.pop())

    def _run_step(self, batch: GlobalBatch) -> None:
        limit = self.recipe.train.max_grad_norm
        train_step(self.accelerator, self.training, batch, limit, self.step_parts.part)  # type: ignore[arg-type]

    def step_flops(self, batch_size: int, sequence_length: int, labelled_tokens: int) -> int | None:
        """What a batch of (rows, width) tokens takes; None where it is not known."""
        work = self.collator.hardware_flop_units(self._build_micro_batch(batch_size, sequence_length, labelled_tokens))
        self.recipe.method.set_training(self.model)
        try:
            with self.emulation.patch_libraries(), self.loss.attention_context():
                found = count_flops(
                    self.model,
                    self.loaded_model.model,
                    virtual_tokens=self.recipe.method.virtual_tokens,
                    gradient_checkpointing=self.gradient_checkpointing,
                    computes_all_logits=self.loss.computes_all_logits,
                )
        except UnsupportedFlopsError:
            return None
        except RuntimeError as error:
            self._raise_if_value_dependent(error)
            raise
        return found.compute_hardware_flops(work)

    @torch.no_grad()
    def simulate_evaluation(self, batch_size: int, sequence_length: int, labelled_tokens: int) -> None:
        """The held-out loss of one batch."""
        self.model.eval()
        self.emulation.has_padding = batch_size > 1
        batch = self._build_batch(batch_size, sequence_length, labelled_tokens, 1).micro_batches[0]
        with self.step_parts.part("evaluate"), self.emulation.autocast(), self.loss.attention_context():
            self.loss.per_token(self.model, batch.to(self.accelerator.device))

    @torch.no_grad()
    def simulate_generation(self, batch_size: int, prompt_length: int, new_tokens: int) -> None:
        """The last token of the longest summaries: keys and values of all before it are there.

        They are made in one pass, as those of the prompt are; with beams, ``rows`` are times those.
        """
        self.model.eval()
        self.emulation.has_padding = batch_size > 1
        ids = torch.zeros((batch_size, prompt_length + new_tokens - 1), dtype=torch.long, device="meta")
        self.model.forward = self.original_forward
        whole = unshard_root(self.model) if self.launch_config.engine.is_fsdp else nullcontext()
        with self.step_parts.part("generate"), self.emulation.autocast(), whole:
            mask = torch.ones_like(ids)
            past = self.model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values
            mask = torch.ones((batch_size, past.get_seq_length() + 1), dtype=torch.long, device="meta")
            base = self.loaded_model.model
            base(input_ids=ids[:, :1], attention_mask=mask, past_key_values=past, use_cache=True, logits_to_keep=1)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        made = self.recipe.optimizer.build(trained, [p for p in trained if id(p) in embeddings])
        self.recipe.optimizer.on_prepared(made.param_groups)
        self._enable_fused(made)
        return made

    def _enable_fused(self, optimizer: torch.optim.Optimizer) -> None:
        """As an optimizer is that is built over weights which are there."""
        if self.recipe.optimizer.is_fused:
            for group in optimizer.param_groups:
                group["fused"] = True

    def _build_batch(
        self, batch_size: int, sequence_length: int, labelled_tokens: LabelCounts, num_micro_batches: int
    ) -> GlobalBatch:
        made = tuple(
            self._build_micro_batch(batch_size, sequence_length, labelled_tokens) for _ in range(num_micro_batches)
        )
        return GlobalBatch(made, TokenCounts(labelled=1))

    def _build_micro_batch(self, batch_size: int, sequence_length: int, labelled_tokens: LabelCounts) -> MicroBatch:
        of_rows = [labelled_tokens] * batch_size if isinstance(labelled_tokens, int) else labelled_tokens
        # On the CPU a batch is there already, but to DDP and fully_shard, who call it "cpu:0"; to a GPU it is copied.
        there = self.device_type == "cpu" and (
            self.launch_config.is_single_process or self.launch_config.engine.is_deepspeed
        )
        with _disable_current_modes():  # they come from elsewhere, and are booked once they are used
            made = self.collator.collate(
                [[0] * sequence_length] * batch_size, [sequence_length - count for count in of_rows]
            )
            return made.map(lambda tensor: tensor.to("meta")) if there else made


def _autocast_forward(model: nn.Module, emulation: DeviceEmulation) -> None:
    """As an Accelerator prepares a model for autocast: the forward pass inside of it, its outputs in float32."""
    from accelerate.utils import convert_outputs_to_fp32

    if emulation.autocast_dtype is None:
        return
    forward = model.forward

    def cast(*given: Any, **named: Any) -> Any:
        with emulation.autocast():
            return forward(*given, **named)

    model.forward = convert_outputs_to_fp32(cast)


def _move_plain_tensors_to_meta(model: nn.Module) -> None:
    """Put tensors that a method keeps outside of parameters and buffers on the meta device, as if they were there.

    From the CPU to the CPU they are not copied; to a GPU they are, at every use.
    """
    for values in vars(model).values():
        if isinstance(values, dict):
            values.update({key: value.to("meta") for key, value in values.items() if isinstance(value, torch.Tensor)})


def _build_single_step_recipe(recipe: Recipe, num_micro_batches: int, num_processes: int) -> Recipe:
    """The recipe with no more than these micro-batches in a step, as an engine is told.

    Casts are steered, so it hears of no precision.
    """
    _, rows = compute_micro_batching(
        recipe.train.global_batch_size, recipe.train.resolved_micro_batch_size, num_processes
    )
    numbers = {
        "global_batch_size": rows * num_micro_batches * num_processes,
        "micro_batch_size": rows,
        "micro_batch_tokens": None,
        "precision": "fp32",
    }
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=numbers), "trackers": ()})


def _empty_batches() -> Batches:
    return Batches([], Collator(0), 1, 1, 0)  # type: ignore[arg-type]
