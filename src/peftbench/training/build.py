"""Build what the training loop needs from a recipe: model, batches, optimizer and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import set_seed
from torch import nn

from peftbench.common.dtypes import TORCH_DTYPES, get_autocast_dtype
from peftbench.common.fingerprint import may_be_equal
from peftbench.data.batches import Batches, EncodedExamples
from peftbench.distributed import deepspeed
from peftbench.distributed.accelerator import AcceleratorContext, verify_engine_config
from peftbench.errors import ModelError, OutOfRangeError, UnsupportedModelError
from peftbench.feature_cache.cached_training import open_feature_cache
from peftbench.methods.frozen_part import FrozenPart
from peftbench.modeling.activation_checkpointing import enable_checkpointing
from peftbench.modeling.activation_offload import ActivationOffload
from peftbench.modeling.frozen_weights import convert_frozen_weights
from peftbench.modeling.generation import list_settings
from peftbench.modeling.loading import LoadedModel, load_model
from peftbench.modeling.loss import CausalLMLoss, build_loss
from peftbench.modeling.quantization import describe_unquantized_modules
from peftbench.optim.roles import find_roles
from peftbench.profiler.flops import FlopCost, NonLinearFlopsError, count_flops
from peftbench.recipe.schema import why_warmup_is_too_long
from peftbench.record import ParameterCounts
from peftbench.training.data import as_numpy, build_collator
from peftbench.training.method_hooks import NO_HOOKS, MethodHooks
from peftbench.training.recipe_trial import try_recipe
from peftbench.training.trial import try_method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftbench.feature_cache.store import FeatureStore
    from peftbench.recipe.schema import Precision, Recipe
    from peftbench.training.trial import Trial

_SCHEDULER_TYPES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class AdaptedModel:
    """A base model with a method applied, not yet prepared by an engine."""

    base: LoadedModel
    parameters: ParameterCounts
    model: nn.Module
    notes: tuple[str, ...]
    gradient_checkpointing: bool
    """True if the backward pass recomputes activations."""
    six_n_parameters: int
    """Parameters outside embeddings, including those that a method added inside the base model."""
    loss: CausalLMLoss
    merges_into_base: bool | None = None
    """True if the adapter can be merged into the base model's weights; None if the method trains the base itself."""
    frozen_part: FrozenPart = field(default_factory=FrozenPart)
    """The part of the base model below everything that is trained."""


@dataclass(frozen=True)
class TrainingComponents:
    """Components that the training loop drives."""

    model: nn.Module
    loss: CausalLMLoss
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    batches: Batches
    total_steps: int
    flop_cost: FlopCost | None = None
    """FLOPs of the model; None if an operation's cost is unknown (see ``flops_unknown_reason``)."""
    flops_unknown_reason: str | None = None
    flop_counter_complete: bool = True
    """True if torch's FLOP counter sees every matrix product."""
    backward_part: str = "backward"
    """Name of the backward pass in timings; DeepSpeed steps the optimizer inside it, so both are one part there."""
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    """Runs the forward pass in the recipe's precision where the engine does not."""
    activation_offload: Callable[[], AbstractContextManager[object]] = nullcontext
    """Offloads tensors that autograd saves for the backward pass."""
    start_step: Callable[[int], None] = lambda _step: None
    """Chooses the parameters that a step (counted from 0) trains."""
    feature_store: FeatureStore | None = None
    """Store of the frozen part's hidden states, None without a feature cache."""
    notes: tuple[str, ...] = ()
    """Notes for the record."""
    method_hooks: MethodHooks = NO_HOOKS
    """Hooks of the method in each step and checkpoint."""


def load_base_model(recipe: Recipe) -> LoadedModel:
    """Load the recipe's base model; random weights depend on ``train.seed``.

    Raises:
        ModelError, HubUnreachableError: the model was not found or is not usable.
    """
    set_seed(recipe.train.seed)
    return load_model(
        recipe.model, get_autocast_dtype(recipe.train.resolved_precision), TORCH_DTYPES[get_loaded_dtype(recipe)]
    )


def get_loaded_dtype(recipe: Recipe) -> Precision:
    """Return the type in which the base model is loaded: float32 if weights of it are trained, which must not round."""
    return "fp32" if recipe.method.trains_loaded_weights else recipe.frozen_dtype


def load_trained_base_model(
    recipe: Recipe, model_dir: Path, base_fingerprint: str, config_fingerprint: str | None
) -> LoadedModel:
    """Load the base model of a training that is saved in ``model_dir``, with the trained weights that are part of it.

    The fingerprints are those of the base model at the training; that of its config is None if it is unknown.
    A method that keeps the base frozen adds its weights with :meth:`peftbench.methods.base.Method.load`.

    Raises:
        ModelError, HubUnreachableError: as in :func:`load_base_model`.
        ModelError: the base model has changed since the training.
    """
    if recipe.method.keeps_base_frozen:
        base = load_base_model(recipe)
        is_same_config = may_be_equal(base.config_fingerprint, config_fingerprint)
        if base.fingerprint != base_fingerprint or not is_same_config:
            raise ModelError(
                f"the base model {recipe.model.path} has changed since {model_dir} was trained on it",
                "train again, or restore the base model",
            )
        return base
    saved = {"path": str(model_dir), "tokenizer": None, "revision": None, "init": "pretrained"}
    loaded = load_model(recipe.model.model_copy(update=saved), get_autocast_dtype(recipe.train.resolved_precision))
    return replace(loaded, fingerprint=base_fingerprint, config_fingerprint=config_fingerprint)


def check_generation(recipe: Recipe, base: LoadedModel) -> list[str]:
    """Check, before the method is applied, that it can generate text with this base model; return notes.

    Raises:
        UnsupportedModelError: it cannot.
    """
    recipe.method.check_generation(base.model)
    settings = list_settings(base.model.generation_config)
    return [f"generation does not use these settings of the base model: {', '.join(settings)}"] if settings else []


def apply_method(
    recipe: Recipe, base: LoadedModel, context: AcceleratorContext, trial: Trial | None = None
) -> AdaptedModel:
    """Apply the recipe's method to ``base``. ``trial`` is the method's trial on this architecture, if there was one.

    Raises:
        PeftbenchError: the recipe does not fit this model.
    """
    trial = trial or try_recipe(recipe, base.model.config)
    total = base.model.num_parameters()  # counts the scalars of quantized tensors, not their packed storage
    notes = [*base.notes, *recipe.method.list_notes(base.model), *trial.list_notes(recipe), *describe_rate(recipe)]
    notes += _list_precision_notes(recipe, base)
    tensors_before = {id(tensor): tensor for tensor in _list_tensors(base.model)}
    model = add_method(recipe, base)
    frozen_part = recipe.method.get_frozen_part(model)  # found by a forward pass, while all weights are of one type
    _check_feature_cache(recipe, frozen_part)
    convert_frozen_weights(base.model, TORCH_DTYPES[recipe.frozen_dtype])
    trainable, six_n_parameters = count_parameters(recipe, base, model)
    parameters = ParameterCounts(
        total=total,
        trainable=trainable,
        added_frozen=_count_added(model, tensors_before),
    )
    checkpointing = _enable_checkpointing(recipe, base, frozen_part, notes)
    if recipe.optimizer.weight_dtype == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16) if parameter.requires_grad else parameter.data
    if recipe.train.activation_offloading and context.accelerator.device.type == "cpu":
        notes.append("activation offloading is off: on CPU, activations are already in host memory")
    if not (context.engine.shards_weights and recipe.method.is_trainable):  # sharded weights are moved shard by shard
        model.to(context.accelerator.device)
    loss, loss_notes = build_loss(
        base.model,
        labeled_only=recipe.train.logits == "labels_only",
        use_masks=recipe.data.label_padding,
        mask_reason=trial.mask_reason,
        kernel=recipe.train.cross_entropy,
    )
    notes += loss_notes
    merges = trial.merging_problem is None if recipe.method.needs_trial else recipe.method.merges_into_base
    return AdaptedModel(
        base,
        parameters,
        model,
        tuple(notes),
        checkpointing,
        six_n_parameters,
        loss,
        merges if recipe.method.keeps_base_frozen else None,
        frozen_part,
    )


def add_method(recipe: Recipe, base: LoadedModel) -> nn.Module:
    """Return the model with the method's parameters added and those frozen that are not trained.

    Raises:
        PeftbenchError: the recipe does not fit this model.
    """
    set_seed(recipe.train.seed)  # a method's new weights depend on the seed alone, not on how the base was loaded
    model = recipe.method.apply(base.model, base.tokenizer)
    if recipe.method.is_trainable:
        recipe.optimizer.prepare_model(model)
    return model


def _list_precision_notes(recipe: Recipe, base: LoadedModel) -> list[str]:
    """Return notes on the types in which weights are held and multiplied."""
    notes = []
    if recipe.model.quantization is not None and (unquantized := describe_unquantized_modules(base.model)):
        notes.append(f"model.quantization={recipe.model.quantization} does not quantize {unquantized}")
    if recipe.frozen_dtype != "fp32":
        trained = f", and trained ones in {recipe.optimizer.weight_dtype}" if recipe.method.is_trainable else ""
        notes.append(f"frozen weights are held in {recipe.frozen_dtype} (model.dtype){trained}")
    if recipe.model.quantization == "int8" and recipe.train.resolved_precision != "fp16":
        notes.append(f"the int8 base model rounds its matmul inputs to fp16, not to {recipe.train.resolved_precision}")
    return notes


def count_parameters(recipe: Recipe, base: LoadedModel, model: nn.Module) -> tuple[int, int]:
    """Return the number of trained scalars, and that of all scalars outside embeddings, added ones included.

    Raises:
        UnsupportedModelError: a method that should train trains none.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if recipe.method.is_trainable and trained == 0:
        raise UnsupportedModelError(
            f"method.kind={recipe.method.kind} trains no parameter of this {base.model.config.model_type}; use another "
            "method"
        )
    return trained, base.model.num_parameters(exclude_embeddings=True)


def _check_feature_cache(recipe: Recipe, part: FrozenPart) -> None:
    """Check that a recipe with a feature cache has something to store.

    Raises:
        UnsupportedModelError: the model has no frozen part.
    """
    if recipe.train.feature_cache is not None and part.is_empty:
        raise UnsupportedModelError(
            f"train.feature_cache={recipe.train.feature_cache} needs a frozen block below every trained parameter, "
            f"but {part.obstacle}; train only later blocks, e.g. with method.kind=last_blocks, or set "
            "train.feature_cache=null"
        )


def _enable_checkpointing(recipe: Recipe, base: LoadedModel, part: FrozenPart, notes: list[str]) -> bool:
    """Enable gradient checkpointing if the recipe requests it and it has an effect; return whether it is enabled."""
    requested = recipe.train.gradient_checkpointing and recipe.method.is_trainable
    enabled = requested and not part.has_all_blocks
    if requested and not enabled:
        notes.append("gradient checkpointing is off: no block has a backward pass")
    if enabled:
        enable_checkpointing(base.model)
    return enabled


def _list_tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _count_added(model: nn.Module, tensors_before: Mapping[int, torch.Tensor]) -> int:
    """Return the number of scalars that a method added and does not train.

    ``tensors_before`` are the base model's tensors by identity. A tensor that replaces one of them, e.g. its
    transpose, is not added.
    """
    tensors = {id(tensor): tensor for tensor in _list_tensors(model)}
    new_trained = sum(t.numel() for key, t in tensors.items() if t.requires_grad and key not in tensors_before)
    before = sum(t.numel() for t in tensors_before.values())
    return sum(t.numel() for t in tensors.values()) - before - new_trained


def describe_rate(recipe: Recipe) -> list[str]:
    """Return a note if the learning rate is outside the range known for the method."""
    method, rate = recipe.method, recipe.optimizer.learning_rate
    if method.learning_rates is None or method.learning_rates[0] <= rate <= method.learning_rates[1]:
        return []
    low, high = method.learning_rates
    known = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return [
        f"optimizer.learning_rate={rate:g} is outside the range known for {method.kind}: {known} "
        f"({method.learning_rate_source})"
    ]


def build_training(
    recipe: Recipe,
    adapted_model: AdaptedModel,
    examples: EncodedExamples,
    pad_token_id: int,
    context: AcceleratorContext,
) -> TrainingComponents:
    """Build batches of the encoded examples, optimizer and schedule, and prepare them with the engine.

    Raises:
        EngineError: the engine's configuration differs from the recipe.
    """
    from transformers import get_scheduler  # imported here because it is slow: it imports peft and much more

    accelerator, settings = context.accelerator, recipe.train
    cost, unknown_reason, counter_complete = _count_flops(recipe, adapted_model, context)
    batches, steps = _build_batches(recipe, adapted_model.loss, examples, pad_token_id, context)
    recipe.method.start_training(adapted_model.model, steps)
    base, part = adapted_model.base.model, adapted_model.frozen_part
    cached = (
        open_feature_cache(recipe, base, part, adapted_model.loss, batches, context=context)
        if settings.feature_cache
        else None
    )
    if settings.compile:
        _compile_blocks(base, adapted_model.loss)
    model, optimizer, inner_optimizer = prepare_with_engine(recipe, adapted_model.model, context)
    # Not prepared: accelerate steps a prepared schedule once per process, but ours counts optimizer steps.
    lr_scheduler = get_scheduler(
        _SCHEDULER_TYPES[recipe.schedule.kind],
        inner_optimizer,
        num_warmup_steps=recipe.schedule.warmup_steps,
        num_training_steps=steps,
    )
    set_seed(settings.seed, device_specific=True)  # dropout differs between ranks
    training = TrainingComponents(
        model,
        adapted_model.loss,
        optimizer,
        lr_scheduler,
        batches,
        steps,
        cost,
        unknown_reason,
        counter_complete,
        start_step=partial(recipe.optimizer.start_step, inner_optimizer, seed=settings.seed),
        notes=(*_list_notes(recipe, inner_optimizer, len(examples)), *(cached.notes if cached else ())),
        method_hooks=MethodHooks.bind(recipe.method, adapted_model.model),
    )
    if cached is not None:
        training = replace(training, loss=cached.loss, batches=cached.batches, feature_store=cached.loss.store)
    if not context.engine_autocasts:
        training = replace(training, autocast=context.autocast)
    if settings.activation_offloading and accelerator.device.type != "cpu":
        training = replace(
            training, activation_offload=partial(ActivationOffload, list(adapted_model.model.parameters()))
        )
    return replace(training, backward_part="backward_and_optimizer") if context.engine.is_deepspeed else training


def _list_notes(recipe: Recipe, optimizer: torch.optim.Optimizer, num_examples: int) -> list[str]:
    """Return notes on examples that repeat within a step, and on the optimizer."""
    notes = recipe.optimizer.list_notes(optimizer.param_groups)
    if (global_batch_size := recipe.train.global_batch_size) > num_examples:
        repeats = math.ceil(global_batch_size / num_examples)
        notes.append(f"each step uses each of the {num_examples} training examples up to {repeats} times")
    return notes


def _build_batches(
    recipe: Recipe, loss: CausalLMLoss, examples: EncodedExamples, pad_token_id: int, context: AcceleratorContext
) -> tuple[Batches, int]:
    """Return this rank's batches and the number of optimizer steps."""
    settings = recipe.train
    if settings.global_batch_size > len(examples) and not settings.repeat_examples:
        raise OutOfRangeError(
            f"train.global_batch_size={settings.global_batch_size} is more than the {len(examples)} training examples",
            f"set it to {len(examples)} or less, or set train.repeat_examples=true to repeat examples within a step",
        )
    batches = Batches(
        as_numpy(examples),
        build_collator(recipe, loss, pad_token_id),
        settings.global_batch_size,
        settings.resolved_micro_batch_size,
        settings.seed,
        context.dp_rank,
        context.dp_world_size,
    )
    steps = batches.count_steps(settings.steps, settings.epochs)
    if settings.micro_batch_tokens is not None:
        batches = batches.limited_to_tokens(settings.micro_batch_tokens, steps)
        context.accelerator.gradient_accumulation_steps = batches.gradient_accumulation_steps
    # If the recipe sets epochs, the number of steps is known only now.
    reason = why_warmup_is_too_long(recipe.schedule.warmup_steps, steps) or recipe.method.why_steps_are_too_few(steps)
    if reason is not None:
        raise OutOfRangeError(reason)
    return batches, steps


def _compile_blocks(base: PreTrainedModel, loss: CausalLMLoss) -> None:
    """Compile each block separately: all blocks share one compiled graph.

    Attention is excluded: it already runs in a fused kernel and would be recompiled for new sequence lengths.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    loss.attention_fn = torch.compiler.disable(loss.attention_fn)
    for module in base.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)


def prepare_with_engine(
    recipe: Recipe, unwrapped_model: nn.Module, context: AcceleratorContext
) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
    """Return the model and optimizer as prepared by the engine, and the optimizer before that.

    Raises:
        EngineError: the engine's configuration differs from the recipe.
    """
    accelerator = context.accelerator
    inner_optimizer = build_optimizer(recipe, unwrapped_model)
    if accelerator.scaler is not None:
        _disable_fused_grad_scaling(inner_optimizer)
    model, optimizer = accelerator.prepare(unwrapped_model, inner_optimizer)
    verify_engine_config(recipe, context, model, optimizer, inner_optimizer)
    recipe.optimizer.on_prepared(deepspeed.get_param_groups(optimizer))
    return model, optimizer, inner_optimizer


def _disable_fused_grad_scaling(optimizer: torch.optim.Optimizer) -> None:
    """Make fp16's loss scaler skip steps itself: a fused kernel skips them without reporting it."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        for group in (optimizer.defaults, *optimizer.param_groups):
            group["fused"] = None


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Build the recipe's optimizer over the trainable parameters of a model that no engine has prepared."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return recipe.optimizer.build(trainable, find_roles(model))


def _count_flops(
    recipe: Recipe, adapted_model: AdaptedModel, context: AcceleratorContext
) -> tuple[FlopCost | None, str | None, bool]:
    """Return the model's FLOPs in training mode or why they are unknown, and whether torch's counter is complete."""
    method = recipe.method
    method.set_training(adapted_model.model)
    model, base = adapted_model.model, adapted_model.base.model
    trial = try_method(method, base.config)
    if trial.flops_problem is not None:
        reason = f"FLOPs have no closed form ({trial.flops_problem})"
        return None, reason, trial.flops_are_counted and not recipe.train.compile
    try:
        with (
            context.autocast(),
            adapted_model.loss.attention_context(),
            recipe.optimizer.first_step(model, recipe.train.seed),
        ):
            cost = count_flops(
                model,
                base,
                virtual_tokens=method.virtual_tokens,
                gradient_checkpointing=adapted_model.gradient_checkpointing,
                computes_all_logits=adapted_model.loss.computes_all_logits,
                compute_penalty=partial(method.compute_penalty, model),
                frozen_modules=adapted_model.frozen_part.list_modules(base),
            )
    except Exception as error:  # a failed measurement must not end a run
        return None, f"FLOPs are unknown: {error or type(error).__name__}", isinstance(error, NonLinearFlopsError)
    return cost, None, not recipe.train.compile  # torch's counter does not see into compiled code
