"""Simulate training steps on the meta device with the real training loop, and record every storage.

The recorded events are the bytes that torch would request from the device's allocator, in order of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from peftbench.common.dtypes import get_autocast_dtype
from peftbench.common.libraries import imports_without_gc
from peftbench.data.batches import Batches, GlobalBatch, compute_micro_batching
from peftbench.data.collate import Collator, MicroBatch, TokenCounts
from peftbench.distributed.accelerator import AcceleratorContext
from peftbench.distributed.deepspeed import unwrap_optimizer
from peftbench.distributed.device_capability import DeviceCapability
from peftbench.distributed.engines import DDP
from peftbench.distributed.memory_owners import collect_engine_buffers
from peftbench.distributed.sharding import unshard_root
from peftbench.errors import EstimateUnavailableError
from peftbench.evaluation.metrics.selection import generates_text
from peftbench.memory.launch_config import SINGLE_PROCESS, LaunchConfig
from peftbench.memory.simulation.architecture import build_base, check_plannable
from peftbench.memory.simulation.device import DeviceEmulation
from peftbench.memory.simulation.fake_accelerator import FakeAccelerator
from peftbench.memory.simulation.repeating_layers import KeptLayers, list_transformer_layers
from peftbench.memory.simulation.values import FakeScalars
from peftbench.modeling.activation_checkpointing import enable_checkpointing
from peftbench.modeling.activation_offload import ActivationOffload
from peftbench.profiler.flop_counter import FlopCounter
from peftbench.profiler.flops import UnsupportedFlopsError, count_flops
from peftbench.profiler.layer_tags import LayerTags
from peftbench.profiler.memory_breakdown import EngineBuffers, MemoryTracker
from peftbench.timing.operations import OperationLog
from peftbench.training.build import (
    TrainingComponents,
    apply_method,
    build_optimizer,
    check_generation,
    prepare_with_engine,
)
from peftbench.training.data import build_collator
from peftbench.training.loop import train_step
from peftbench.training.method_hooks import MethodHooks

if TYPE_CHECKING:
    from peftbench.recipe.schema import Recipe

LabelCounts = int | Sequence[int]


@dataclass
class _StepPartTracker:
    """The current part of a step; fake values are allowed depending on it."""

    emulation: DeviceEmulation
    fake_scalars: FakeScalars = field(default_factory=FakeScalars)
    current_part: str | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Enter the part ``name``."""
        self.current_part, self.emulation.allow_fake_scalars = name, name == "optimizer"
        self.fake_scalars.is_enabled = name not in {"forward", "evaluate", "generate"}
        try:
            yield
        finally:
            self.current_part, self.emulation.allow_fake_scalars, self.fake_scalars.is_enabled = None, False, True


class MemorySimulation:
    """Context manager that simulates a recipe on an emulated device and records every storage.

    Code that needs tensor values raises EstimateUnavailableError with the name of the module.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: DeviceCapability,
        num_micro_batches: int,
        *,
        has_padding: bool = True,
        launch_config: LaunchConfig = SINGLE_PROCESS,
        kept_layers: KeptLayers | None = None,
    ) -> None:
        """``num_micro_batches`` is per step and process; ``has_padding`` is True for rows of different lengths.

        With ``kept_layers`` the model has only these layers, and the events of each have its tag.

        Raises:
            ModelError: the architecture is unknown.
        """
        self.recipe, self.launch_config = recipe, launch_config
        self.device_type = device_type = device.device_type
        self._module_stack: list[str] = []
        self.accumulation = num_micro_batches
        # Later micro-batches repeat the second one, except on CPU, where the tokens of all exist from the start.
        self.num_micro_batches = min(num_micro_batches, 2) if device_type == "cuda" else num_micro_batches
        self.accelerator: Any = FakeAccelerator(self.num_micro_batches)
        context = AcceleratorContext(self.accelerator, launch_config.engine, recipe.train.resolved_precision)
        self.emulation = DeviceEmulation(
            device, get_autocast_dtype(recipe.train.resolved_precision), has_padding=has_padding
        )
        self._trial = check_plannable(recipe)
        with imports_without_gc():  # imports the architecture's code and the method's library
            self.loaded_model = build_base(recipe, kept_layers)
            with self._track_method_modules(), self.emulation.patch_libraries():
                if generates_text(recipe):
                    check_generation(recipe, self.loaded_model)
                adapted = apply_method(recipe, self.loaded_model, context, self._trial)
        self.model, self.loss, self._method_notes = adapted.model, adapted.loss, adapted.notes
        self.method_hooks = MethodHooks.bind(recipe.method, adapted.model)
        self.collator = build_collator(recipe, adapted.loss, pad_token_id=0)
        self.gradient_checkpointing = adapted.gradient_checkpointing
        if adapted.gradient_checkpointing:
            context_fn: Callable[[], Any] = lambda: (nullcontext(), self.emulation.recompute())  # noqa: E731
            enable_checkpointing(self.loaded_model.model, context_fn=context_fn)
        if device_type == "cpu":
            _move_plain_tensors_to_meta(self.model)
        self.layers = list_transformer_layers(self.loaded_model.model)
        self._layer_tags = None if kept_layers is None else LayerTags(self.layers, kept_layers.tags)
        self.step_parts = _StepPartTracker(self.emulation)
        self.operation_log = OperationLog(lambda: self.step_parts.current_part, device_type)
        self.original_forward = self.model.forward
        self._flop_counter: FlopCounter | None = None
        self._contexts = ExitStack()
        self._register_module_hooks(self.model)

    @property
    def max_positions(self) -> int | None:
        """The model's maximum number of positions, None if its config has none."""
        return self.loaded_model.max_positions

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the plan: of the method, and of the simulated steps."""
        return (*self._method_notes, *self.emulation.notes, *self.recipe.optimizer.list_plan_notes())

    @contextmanager
    def _track_method_modules(self) -> Iterator[None]:
        """Track the current module while a method is applied, since that runs forward passes."""
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
        """Register hooks that keep a stack of the running modules."""
        hooks: list[Any] = []
        for name, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda *_, entered=name: self._module_stack.append(entered)))
            hooks.append(module.register_forward_hook(self._pop_module))
        return hooks

    def _pop_module(self, *_: object) -> None:
        if self._module_stack:  # a method may copy a module with its hooks
            self._module_stack.pop()

    def __enter__(self) -> MemorySimulation:
        try:
            self._prepare()
        except BaseException as error:
            self._contexts.close()
            self._raise_if_value_dependent(error)
            raise
        patches = self.recipe.optimizer.meta_context(self.device_type)
        for context in (self.emulation.patch_libraries(), patches, self.emulation):
            self._contexts.enter_context(context)
        return self

    def _prepare(self) -> None:
        """Prepare model and optimizer with the engine."""
        schedule = partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)
        if self.launch_config.is_single_process:
            if self._offloads_activations:  # offloaded tensors are never written
                self._contexts.enter_context(self.step_parts.fake_scalars)
            optimizer = self._build_optimizer()
            self.training = self._with_activation_offload(
                TrainingComponents(
                    self.model,
                    self.loss,
                    optimizer,
                    schedule(optimizer),
                    _empty_batches(),
                    2,
                    method_hooks=self.method_hooks,
                )
            )
            self._start_tracking()
            return
        from peftbench.memory.simulation.process_group import fake_distributed

        step_recipe = _build_single_step_recipe(self.recipe, self.num_micro_batches, self.launch_config.dp_world_size)
        context = self._contexts.enter_context(
            fake_distributed(step_recipe, self.launch_config, self.emulation, self.step_parts.fake_scalars)
        )
        self.accelerator = context.accelerator
        prepared_model, optimizer, inner_optimizer = prepare_with_engine(step_recipe, self.model, context)
        self._enable_fused(unwrap_optimizer(optimizer))
        self.training = TrainingComponents(
            prepared_model,
            self.loss,
            optimizer,
            schedule(inner_optimizer),
            _empty_batches(),
            3,
            method_hooks=self.method_hooks,
        )
        if not context.engine_autocasts:
            self.training = replace(self.training, autocast=self.emulation.autocast)
        if context.engine.is_deepspeed:
            self.training = replace(self.training, backward_part="backward_and_optimizer")
        self.training = self._with_activation_offload(self.training)

    @property
    def _offloads_activations(self) -> bool:
        """True if activations are offloaded to host memory; on CPU they are in it anyway."""
        return self.recipe.train.activation_offloading and self.device_type == "cuda"

    def _with_activation_offload(self, training: TrainingComponents) -> TrainingComponents:
        if not self._offloads_activations:
            return training
        return replace(training, activation_offload=partial(ActivationOffload, list(self.model.parameters()), "meta"))

    def _start_tracking(self) -> None:
        """Start recording storages."""
        prepared_model, optimizer = self.training.model, self.training.optimizer
        self.memory_tracker = MemoryTracker(
            self.model,
            optimizer,
            self.loaded_model.model.config.vocab_size,
            lambda: self.step_parts.current_part,
            get_engine_buffers=lambda: (
                EngineBuffers()
                if self.launch_config.is_single_process
                else collect_engine_buffers(prepared_model, self.model, optimizer)
            ),
            device_type="meta" if self.device_type == "cuda" else None,  # for a GPU, host memory is not counted
            list_method_tensors=self.method_hooks.list_state_tensors,
            layers=self._layer_tags,
        )
        self._contexts.enter_context(self.memory_tracker)

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        self._contexts.close()
        self._raise_if_value_dependent(error)

    def _raise_if_value_dependent(self, error: BaseException | None) -> None:
        """Convert errors caused by missing tensor values; all other errors are bugs and propagate unchanged.

        Raises:
            EstimateUnavailableError: a module needs values; the message names it.
        """
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
            raise EstimateUnavailableError(
                f"Not enough virtual memory to simulate the CPU offload of {self.launch_config.engine.name}; run the "
                "estimate on a machine with more memory"
            ) from error
        if isinstance(error, (RuntimeError, NotImplementedError)) and "meta" in str(error).lower():
            module = self._module_stack[-1] if self._module_stack else "this recipe"
            model_type = self.loaded_model.model.config.model_type
            raise EstimateUnavailableError(
                f"{module} ({model_type}) cannot be simulated without tensor values: {str(error).splitlines()[0]}"
            ) from error

    def simulate_training(self, batch_size: int, sequence_length: int, labeled_tokens: LabelCounts) -> None:
        """Run two steps of (batch_size, sequence_length) micro-batches; peaks are those of the second step.

        Optimizer states exist from the second step. The last ``labeled_tokens`` of each row are labeled (one number
        for all rows or one per row), or all tokens if the recipe labels all.

        With a distributed engine, one more step runs first, in which the engine creates its plans and buffers.
        """
        self.recipe.method.set_training(self.model)
        if self.launch_config.is_single_process or self.launch_config.engine == DDP:
            _autocast_forward(self.model, self.emulation)
        batches = [
            self._build_batch(batch_size, sequence_length, labeled_tokens, self.num_micro_batches)
            for _ in range(self.training.total_steps)
        ]
        with self.loss.attention_context():
            if not self.launch_config.is_single_process:
                self._run_step(batches.pop())
                self._start_tracking()
            self._run_step(batches.pop())
            self.memory_tracker.mark()
            with self._build_flop_counter() or nullcontext() as self._flop_counter, self.operation_log:
                self._run_step(batches.pop())

    def _build_flop_counter(self) -> FlopCounter | None:
        """Return a counter of a step's FLOPs if they have no closed form but can be counted; else None."""
        is_needed = self._trial.flops_problem is not None and self._trial.flops_are_counted
        return FlopCounter(lambda: self.step_parts.current_part == "optimizer") if is_needed else None

    @property
    def counted_flops(self) -> int | None:
        """FLOPs of a step of one process as counted in the simulated training; None if they were not counted."""
        if self._flop_counter is None or self._flop_counter.total_flops is None:
            return None
        return self._flop_counter.total_flops * self.accumulation // self.num_micro_batches

    def _run_step(self, batch: GlobalBatch) -> None:
        train_step(
            self.accelerator,
            self.training,
            batch,
            self.recipe.train.max_grad_norm,
            self.step_parts.part,  # type: ignore[arg-type]
            step=self.recipe.method.simulated_step,
        )

    def step_flops(self, batch_size: int, sequence_length: int, labeled_tokens: int) -> int | None:
        """Return the FLOPs of a batch of (batch_size, sequence_length) tokens, None without a closed form."""
        if self._trial.flops_problem is not None:
            return None
        flop_units = self.collator.hardware_flop_units(
            self._build_micro_batch(batch_size, sequence_length, labeled_tokens)
        )
        self.recipe.method.set_training(self.model)
        try:
            with (
                self.emulation.patch_libraries(),
                self.loss.attention_context(),
                self.recipe.optimizer.first_step(self.model, self.recipe.train.seed),
            ):
                flop_cost = count_flops(
                    self.model,
                    self.loaded_model.model,
                    virtual_tokens=self.recipe.method.virtual_tokens,
                    gradient_checkpointing=self.gradient_checkpointing,
                    computes_all_logits=self.loss.computes_all_logits,
                    compute_penalty=self.method_hooks.compute_penalty,
                )
        except UnsupportedFlopsError:
            return None
        except RuntimeError as error:
            self._raise_if_value_dependent(error)
            raise
        return flop_cost.compute_hardware_flops(replace(flop_units, passes=self.accumulation))

    @torch.no_grad()
    def simulate_evaluation(self, batch_size: int, sequence_length: int, labeled_tokens: int) -> None:
        """Simulate the evaluation loss of one batch."""
        self.model.eval()
        self.emulation.has_padding = batch_size > 1
        batch = self._build_batch(batch_size, sequence_length, labeled_tokens, 1).micro_batches[0]
        with self.step_parts.part("evaluate"), self.emulation.autocast(), self.loss.attention_context():
            self.loss.per_token(self.model, batch.to(self.accelerator.device))

    @torch.no_grad()
    def simulate_generation(self, batch_size: int, prompt_length: int, new_tokens: int) -> None:
        """Simulate generating the last token of the longest sequences, with a full key-value cache.

        One forward pass fills the cache, as for a prompt. ``batch_size`` includes the beams.
        """
        self.model.eval()
        self.emulation.has_padding = batch_size > 1
        ids = torch.zeros((batch_size, prompt_length + new_tokens - 1), dtype=torch.long, device="meta")
        self.model.forward = self.original_forward
        unsharded = unshard_root(self.model) if self.launch_config.engine.is_fsdp else nullcontext()
        with self.step_parts.part("generate"), self.emulation.autocast(), unsharded:
            mask = torch.ones_like(ids)
            past = self.model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values
            mask = torch.ones((batch_size, past.get_seq_length() + 1), dtype=torch.long, device="meta")
            base_model = self.loaded_model.model
            base_model(
                input_ids=ids[:, :1], attention_mask=mask, past_key_values=past, use_cache=True, logits_to_keep=1
            )

    def _build_optimizer(self) -> torch.optim.Optimizer:
        optimizer = build_optimizer(self.recipe, self.model)
        self.recipe.optimizer.on_prepared(optimizer.param_groups)
        self._enable_fused(optimizer)
        self.recipe.optimizer.start_step(optimizer, 0, self.recipe.train.seed)
        return optimizer

    def _enable_fused(self, optimizer: torch.optim.Optimizer) -> None:
        """Select the fused AdamW kernel, as torch does for real weights."""
        if self.recipe.optimizer.is_fused:
            for group in optimizer.param_groups:
                if "fused" in group:
                    group["fused"] = True

    def _build_batch(
        self, batch_size: int, sequence_length: int, labeled_tokens: LabelCounts, num_micro_batches: int
    ) -> GlobalBatch:
        micro_batches = tuple(
            self._build_micro_batch(batch_size, sequence_length, labeled_tokens) for _ in range(num_micro_batches)
        )
        return GlobalBatch(micro_batches, TokenCounts(labeled=1))

    def _build_micro_batch(self, batch_size: int, sequence_length: int, labeled_tokens: LabelCounts) -> MicroBatch:
        label_counts = [labeled_tokens] * batch_size if isinstance(labeled_tokens, int) else labeled_tokens
        # A GPU gets a copy of each batch. On CPU, only DDP and fully_shard copy it, since their device is "cpu:0".
        is_on_device = self.device_type == "cpu" and (
            self.launch_config.is_single_process or self.launch_config.engine.is_deepspeed
        )
        with _disable_current_modes():  # created outside the device; recorded when used
            batch = self.collator.collate(
                [[0] * sequence_length] * batch_size,
                [(sequence_length - count, sequence_length) for count in label_counts],
            )
            return batch.map(lambda tensor: tensor.to("meta")) if is_on_device else batch


def _autocast_forward(model: nn.Module, emulation: DeviceEmulation) -> None:
    """Wrap forward in autocast and convert its outputs to float32, like Accelerator.prepare."""
    from accelerate.utils import convert_outputs_to_fp32

    if emulation.autocast_dtype is None:
        return
    forward = model.forward

    def autocast_forward(*args: Any, **kwargs: Any) -> Any:
        with emulation.autocast():
            return forward(*args, **kwargs)

    model.forward = convert_outputs_to_fp32(autocast_forward)


def _move_plain_tensors_to_meta(model: nn.Module) -> None:
    """Move tensors that a method keeps outside of parameters and buffers to the meta device.

    A run on CPU uses them without a copy; a run on a GPU copies them at every use.
    """
    for values in vars(model).values():
        if isinstance(values, dict):
            values.update({key: value.to("meta") for key, value in values.items() if isinstance(value, torch.Tensor)})


def _build_single_step_recipe(recipe: Recipe, num_micro_batches: int, dp_world_size: int) -> Recipe:
    """Return the recipe with ``num_micro_batches`` per step, for the engine's configuration.

    The precision is fp32, since :class:`DeviceEmulation` does the casts.
    """
    _, rows = compute_micro_batching(
        recipe.train.global_batch_size, recipe.train.resolved_micro_batch_size, dp_world_size
    )
    overrides = {
        "global_batch_size": rows * num_micro_batches * dp_world_size,
        "micro_batch_size": rows,
        "micro_batch_tokens": None,
        "precision": "fp32",
    }
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=overrides), "trackers": ()})


def _empty_batches() -> Batches:
    return Batches([], Collator(0), 1, 1, 0)  # type: ignore[arg-type]
