"""From a recipe to what the loop runs: model, batches, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate.utils import set_seed
from torch import nn

from peftbench.data.batches import Batches, EncodedExamples
from peftbench.data.collate import Collator, PaddingFreeCollator
from peftbench.data.encode import Encoder, SequenceLayout
from peftbench.distributed import deepspeed
from peftbench.distributed.accelerator import AcceleratorContext, verify_engine_config
from peftbench.distributed.collectives import main_process_first
from peftbench.errors import EmptySplitError, OutOfRangeError
from peftbench.feature_cache.cached_training import open_feature_cache
from peftbench.modeling.activation_offload import ActivationOffload
from peftbench.modeling.loading import LoadedModel, get_max_positions, load_model
from peftbench.modeling.loss import CausalLMLoss, build_loss
from peftbench.profiler.flops import FlopCost, NonLinearFlopsError, count_flops
from peftbench.record import ParameterCounts

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import PreTrainedModel

    from peftbench.feature_cache.store import FeatureStore
    from peftbench.recipe.schema import Recipe

_SCHEDULER_TYPES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class EncodedSplit:
    """One split, subsampled and encoded."""

    dataset: Dataset
    num_dropped: int


@dataclass(frozen=True)
class AdaptedModel:
    """A base with a method applied to it, before any engine has it."""

    base: LoadedModel
    parameters: ParameterCounts
    model: nn.Module
    notes: tuple[str, ...]
    gradient_checkpointing: bool
    """Whether activations are computed again in the backward pass."""
    six_n_parameters: int
    """Parameters outside embeddings, those a method put into the base included."""
    loss: CausalLMLoss


@dataclass(frozen=True)
class TrainingComponents:
    """What the loop drives."""

    model: nn.Module
    loss: CausalLMLoss
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    batches: Batches
    total_steps: int
    flop_cost: FlopCost | None = None
    """FLOPs of the model, None where it computes something of unknown cost; why is in ``uncounted``."""
    flops_unknown_reason: str | None = None
    flop_counter_complete: bool = True
    """Whether torch's counter knows every product that is computed."""
    backward_part: str = "backward"
    """What the backward pass is called; DeepSpeed steps the optimizer in it, and the two cannot be told apart."""
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    """Puts the forward pass into the recipe's precision, where the engine does not do so itself."""
    activation_offload: Callable[[], AbstractContextManager[object]] = nullcontext
    """Moves what the forward pass keeps for the backward pass."""
    feature_store: FeatureStore | None = None
    """Of the hidden states of a frozen trunk."""
    notes: tuple[str, ...] = ()
    """What a reader of the record must know."""


def load_split(recipe: Recipe, split: str) -> Dataset:
    """The recipe's seeded subsample of a split, not yet encoded.

    Raises:
        EmptySplitError: fewer examples than the recipe draws.
    """
    dataset = recipe.data.source.load(split)
    wanted: int | None = getattr(recipe.data, split)
    if wanted is None:
        return dataset
    if wanted > len(dataset):
        raise EmptySplitError(
            f"data.{split}={wanted} asks for more than the {len(dataset)} examples of the {split} split; "
            f"set it to {len(dataset)} or less, or to null for all"
        )
    return dataset.shuffle(seed=recipe.data.seed).select(range(wanted))


def load_encoded_split(recipe: Recipe, encoder: Encoder, split: str, accelerator: Accelerator) -> EncodedSplit:
    """The recipe's subsample of a split, encoded by one rank for all."""

    def encoded() -> EncodedSplit:
        return EncodedSplit(*encoder.encode_split(load_split(recipe, split), split, recipe.data.overlong))

    return main_process_first(accelerator, encoded)


def build_encoder(recipe: Recipe, base: LoadedModel) -> Encoder:
    """The encoder for this base and this method's virtual tokens."""
    layout = SequenceLayout.for_model(
        separator=recipe.data.separator,
        max_length=recipe.data.max_length,
        max_new_tokens=recipe.evaluate.max_new_tokens,
        max_positions=base.max_positions,
        virtual_tokens=recipe.method.virtual_tokens,
    )
    return Encoder(base.tokenizer, layout)


def load_base_model(recipe: Recipe) -> LoadedModel:
    """The recipe's base; where its weights are random, they depend on ``train.seed``.

    Raises:
        ModelError, HubUnreachableError: it is not there, or cannot be used.
    """
    set_seed(recipe.train.seed)
    return load_model(recipe.model, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.train.precision))


def apply_method(recipe: Recipe, base: LoadedModel, context: AcceleratorContext) -> AdaptedModel:
    """Apply the method to ``base``.

    Raises:
        PeftbenchError: any mistake of the recipe's that shows only now.
    """
    set_seed(recipe.train.seed)  # a method's new weights depend on the seed alone, not on how the base was made
    total = base.model.num_parameters()  # which knows how many a quantised tensor holds
    model = recipe.method.apply(base.model, base.tokenizer)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    notes = []
    wanted = recipe.train.gradient_checkpointing and recipe.method.is_trainable
    checkpointing = wanted and not recipe.method.has_frozen_backbone
    if wanted and not checkpointing:
        notes.append("gradient checkpointing was left out: nothing below the head is differentiated")
    if checkpointing:
        base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.optimizer.weight_dtype == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16) if parameter.requires_grad else parameter.data
    if recipe.train.activation_offloading and context.accelerator.device.type == "cpu":
        notes.append("activation offload was left out: activations are in the CPU's memory anyway")
    if recipe.model.quantization == "int8" and recipe.train.precision != "fp16":
        notes.append(f"the int8 base rounds what it multiplies to fp16, and not to {recipe.train.precision}")
    if not (context.engine.shards_weights and recipe.method.is_trainable):  # those come to the device part by part
        model.to(context.accelerator.device)
    parameters = ParameterCounts(total=total, trainable=trainable)
    loss, unspared = build_loss(
        base.model,
        labelled_only=recipe.train.logits == "labels_only",
        use_masks=recipe.data.label_padding,
        kernel=recipe.train.cross_entropy,
    )
    notes += unspared
    # With what the method put into the base, as HF Trainer counts.
    six_n_parameters = base.model.num_parameters(exclude_embeddings=True)
    return AdaptedModel(base, parameters, model, tuple(notes), checkpointing, six_n_parameters, loss)


def build_training(
    recipe: Recipe,
    adapted_model: AdaptedModel,
    examples: EncodedExamples,
    pad_token_id: int,
    context: AcceleratorContext,
) -> TrainingComponents:
    """Batches of the encoded examples ``train``, optimizer and schedule, prepared by the engine.

    Raises:
        EngineError: the engine did not start as the recipe asks.
    """
    from transformers import get_scheduler  # which brings peft with it, and that half of all there is

    accelerator = context.accelerator
    cost, uncounted, seen = _count_flops(recipe, adapted_model, context)
    collator = build_collator(recipe, adapted_model.loss, pad_token_id)
    knobs = recipe.train
    batches = Batches(
        _as_numpy(examples),
        collator,
        knobs.global_batch_size,
        knobs.resolved_micro_batch_size,
        knobs.seed,
        context.dp_rank,
        context.dp_world_size,
    )
    steps = batches.count_steps(knobs.steps, knobs.epochs)
    if knobs.micro_batch_tokens is not None:
        batches = batches.limited_to_tokens(knobs.micro_batch_tokens, steps)
        accelerator.gradient_accumulation_steps = batches.gradient_accumulation_steps
    kept = (
        open_feature_cache(recipe, adapted_model.base.model, adapted_model.loss, batches, accelerator)
        if knobs.feature_cache
        else None
    )
    if knobs.compile:
        _compile_blocks(adapted_model.base.model, adapted_model.loss)
    model, optimizer, bare = prepare_with_engine(recipe, adapted_model.model, context)
    # Not prepared: accelerate steps a prepared schedule once per process, and ours counts optimizer steps.
    schedule = get_scheduler(
        _SCHEDULER_TYPES[recipe.schedule.kind],
        bare,
        num_warmup_steps=recipe.schedule.warmup_steps,
        num_training_steps=steps,
    )
    set_seed(knobs.seed, device_specific=True)  # dropout differs between ranks
    trainer = TrainingComponents(model, adapted_model.loss, optimizer, schedule, batches, steps, cost, uncounted, seen)
    if kept is not None:
        trainer = replace(
            trainer, loss=kept.loss, batches=kept.batches, feature_store=kept.loss.store, notes=kept.notes
        )
    if not context.engine_autocasts:
        trainer = replace(trainer, autocast=context.autocast)
    if recipe.train.activation_offloading and accelerator.device.type != "cpu":
        trainer = replace(
            trainer, activation_offload=partial(ActivationOffload, list(adapted_model.model.parameters()))
        )
    return replace(trainer, backward_part="backward_and_optimizer") if context.engine.is_deepspeed else trainer


def _compile_blocks(base: PreTrainedModel, loss: CausalLMLoss) -> None:
    """Compile each block by itself: they are alike, so that one is compiled for all.

    Attention is left out. It is a kernel already, and would be compiled anew for documents of other lengths.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    loss.attention_fn = torch.compiler.disable(loss.attention_fn)
    for module in base.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)


def _as_numpy(examples: EncodedExamples) -> EncodedExamples:
    """Encoded examples as arrays, which become tensors as they are; lists of numbers take several times as long."""
    with_format = getattr(examples, "with_format", None)  # a Dataset's
    return examples if with_format is None else with_format("numpy")  # type: ignore[no-any-return]


def build_collator(recipe: Recipe, loss: CausalLMLoss, pad_token_id: int) -> Collator:
    """What makes micro-batches of the recipe's examples.

    Raises:
        OutOfRangeError: they are to share rows without padding, and the model cannot tell them apart, or they are to be
            padded to a multiple of more positions than the model has.
    """
    padding, virtual = recipe.data.padding, recipe.method.virtual_tokens
    multiple, most = recipe.data.pad_to_multiple_of, get_max_positions(loss.base.config)
    if most is not None and multiple > most:
        raise OutOfRangeError(
            f"data.pad_to_multiple_of={multiple} is more than the {most} positions of the model; set {most} or less"
        )
    if padding == "free" and loss.uses_masks:
        raise OutOfRangeError(
            f"data.padding=free puts examples into one row, and this model would look from one into another: "
            f"{loss.mask_reason}; set data.padding=longest"
        )
    if padding == "free" or (padding == "auto" and not loss.uses_masks):
        return PaddingFreeCollator(pad_token_id, virtual, pad_to_multiple_of=multiple)
    pad_to = recipe.data.max_length if padding == "max_length" else None
    published = recipe.data.label_padding
    return Collator(
        pad_token_id, virtual, pad_to, label_padding=published, pad_to_multiple_of=multiple, max_positions=most
    )


def prepare_with_engine(
    recipe: Recipe, unwrapped_model: nn.Module, context: AcceleratorContext
) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
    """What the engine makes of a model and of its optimizer, and the optimizer before.

    Raises:
        EngineError: the engine did not start as the recipe asks.
    """
    accelerator = context.accelerator
    bare = recipe.optimizer.build(*_get_trainable_parameters(unwrapped_model))
    if accelerator.scaler is not None:
        _disable_fused_grad_scaling(bare)
    model, optimizer = accelerator.prepare(unwrapped_model, bare)
    verify_engine_config(recipe, context, model, optimizer, bare)
    recipe.optimizer.on_prepared(deepspeed.get_param_groups(optimizer))
    return model, optimizer, bare


def _disable_fused_grad_scaling(optimizer: torch.optim.Optimizer) -> None:
    """Have fp16's loss scaler skip a step itself: a fused kernel would, and nobody would hear that it did."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        for group in (optimizer.defaults, *optimizer.param_groups):
            group["fused"] = None


def _get_trainable_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trained, and what of it are embeddings' matrices."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return trained, [parameter for parameter in trained if id(parameter) in embedded]


def _count_flops(
    recipe: Recipe, adapted_model: AdaptedModel, context: AcceleratorContext
) -> tuple[FlopCost | None, str | None, bool]:
    """FLOPs of the bare model in the mode it is trained in, or why they are not known; and whether they are counted."""
    method = recipe.method
    method.set_training(adapted_model.model)
    model, base = adapted_model.model, adapted_model.base.model
    try:
        with context.autocast(), adapted_model.loss.attention_context():
            found = count_flops(
                model,
                base,
                virtual_tokens=method.virtual_tokens,
                gradient_checkpointing=adapted_model.gradient_checkpointing,
                computes_all_logits=adapted_model.loss.computes_all_logits,
            )
    except Exception as error:  # an instrument must not end a run
        return None, f"FLOPs are not known: {error or type(error).__name__}", isinstance(error, NonLinearFlopsError)
    return found, None, not recipe.train.compile  # the counter does not see into what is compiled
