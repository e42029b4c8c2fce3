"""Train over a frozen backbone's stored hidden states: each example passes the backbone once, then only the head.

The order of examples, the steps and all counts stay the same. Every rank derives from the batch order which examples an
earlier step has computed on any rank, so ranks agree on what to compute without communication: the all-reduce at the
end of a step follows all writes of that step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from peftbench.data.batches import Batches, GlobalBatch
from peftbench.data.collate import FlopUnits, MicroBatch
from peftbench.distributed.collectives import broadcast_from_main
from peftbench.errors import UnsupportedModelError
from peftbench.feature_cache.key import build_cache_key, hash_encoded_examples
from peftbench.feature_cache.store import STORAGE_DTYPES, FeatureStore, StoreLayout, describe_store, open_store
from peftbench.modeling.loss import CausalLMLoss, LabeledLogitsLoss, select_positions

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from peftbench.recipe.schema import Recipe


class CachedFeatureLoss(CausalLMLoss):
    """Loss of a model that skips its backbone where the hidden states are stored.

    The whole model is called either way, inside the engine's wrappers, so gradients are averaged as usual and whatever
    the model does to its logits is done. The backbone's forward pass is replaced: it returns a cached one-token output,
    and the head receives the stored states. Computed states are rounded to the stored dtype too, so a step's loss does
    not depend on whether its states were computed or loaded.
    """

    computes_all_logits = False

    def __init__(self, inner: LabeledLogitsLoss, store: FeatureStore) -> None:
        self.base, self.mask_reason, self.uses_masks = inner.base, inner.mask_reason, inner.uses_masks
        self.inner, self.store = inner, store
        self._step_inputs: _StepInputs | None = None
        backbone: nn.Module = inner.base.base_model
        with torch.no_grad():
            token = torch.zeros((1, 1), dtype=torch.long, device=inner.base.device)
            self._single_token_output = backbone(input_ids=token, use_cache=False)
        self._backbone_forward = backbone.forward
        backbone.forward = self._forward_backbone_or_skip
        inner.select_positions = self._select_features

    def attention_context(self) -> AbstractContextManager[None]:
        return self.inner.attention_context()

    def logits(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        return self.inner.logits(model, batch)

    def __call__(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        if batch.feature_mode == "recompute":
            return self.inner(model, batch)
        device = batch.targets.device
        features = None
        if batch.feature_mode == "load":
            stored = self.store.read(batch.example_indices, pin_memory=device.type == "cuda")
            features = stored.to(device, non_blocking=True).float()
        self._step_inputs = _StepInputs(batch, features)
        try:
            return self.inner(model, batch)
        finally:
            self._step_inputs = None

    def _forward_backbone_or_skip(self, *args: Any, **kwargs: Any) -> Any:
        if self._step_inputs is not None and self._step_inputs.features is not None:
            return self._single_token_output
        return self._backbone_forward(*args, **kwargs)

    def _select_features(self, hidden: torch.Tensor, predictors: torch.Tensor) -> torch.Tensor:
        if self._step_inputs is None:
            return select_positions(hidden, predictors)
        if self._step_inputs.features is not None:
            return self._step_inputs.features
        computed = select_positions(hidden, predictors)
        self.store.write(self._step_inputs.batch.example_indices, computed)
        return computed.to(STORAGE_DTYPES[self.store.layout.dtype]).float()


@dataclass(frozen=True)
class _StepInputs:
    """Inputs of the micro-batch being computed."""

    batch: MicroBatch
    features: torch.Tensor | None
    """Hidden states at labeled positions (labeled, width), float32; None if the backbone computes them."""


@dataclass(frozen=True)
class CachedFeatureBatches(Batches):
    """Batches whose micro-batches state whether their hidden states are saved to or loaded from the store."""

    cached_mask: torch.Tensor = field(kw_only=True)
    """True for examples whose states are stored before the next global batch; :meth:`build_batch` updates it."""

    def skip_first_batches(self, num_batches: int) -> Iterator[GlobalBatch]:
        return Batches.skip_first_batches(replace(self, cached_mask=self.cached_mask.clone()), num_batches)

    def build_batch(self, indices: Sequence[int]) -> GlobalBatch:
        batch = super().build_batch(indices)
        self.cached_mask[list(indices)] = True  # they are written before the next batch is computed
        return batch

    def collate(self, examples: Sequence[tuple[Sequence[int], Sequence[int], int]]) -> MicroBatch:
        micro_batch = super().collate(examples)
        is_cached = bool(self.cached_mask[list(micro_batch.example_indices)].all())
        return replace(micro_batch, feature_mode="load" if is_cached else "save")

    def hardware_flop_units(self, micro_batch: MicroBatch) -> FlopUnits:
        """Return the FLOP units that are computed; only the head's if the backbone is skipped."""
        if micro_batch.feature_mode == "load":
            return FlopUnits(labeled=len(micro_batch.targets))
        return super().hardware_flop_units(micro_batch)


@dataclass(frozen=True)
class CachedTraining:
    """Replacements of loss and batches in a training run over a feature store."""

    loss: CachedFeatureLoss
    batches: CachedFeatureBatches
    notes: tuple[str, ...]


def open_feature_cache(
    recipe: Recipe, base: PreTrainedModel, loss: CausalLMLoss, batches: Batches, accelerator: Accelerator
) -> CachedTraining:
    """Open or create the store of this backbone's hidden states; a collective: all ranks must call it.

    Logs the store's size on standard error before creating it.

    Raises:
        UnsupportedModelError: the model has no backbone separate from its head.
        OutputError, DiskFullError: the store's folder is not writable or the disk is too full.
    """
    dtype = recipe.train.feature_cache
    assert dtype is not None, "train.feature_cache is set"
    if not isinstance(loss, LabeledLogitsLoss) or base.base_model is base:
        raise UnsupportedModelError(
            f"{base.config.model_type} has no backbone separate from its head, so its states cannot be cached; set "
            "train.feature_cache=null"
        )

    backbone: nn.Module = base.base_model
    assert not backbone.training, "dropout would change the hidden states in each epoch"
    assert not any(parameter.requires_grad for parameter in backbone.parameters()), "so would trainable weights"

    def log(message: str) -> None:
        tqdm.write(message, file=sys.stderr)

    def open_on_main() -> tuple[dict[str, Any], StoreLayout, torch.Tensor]:
        examples_hash, label_counts = hash_encoded_examples(batches.dataset)
        cache_key = build_cache_key(recipe, base, examples_hash, accelerator.device, uses_masks=loss.uses_masks)
        layout = StoreLayout(label_counts, loss.head.get_parameter("weight").shape[-1], dtype)
        return cache_key, layout, open_store(cache_key, layout, log).completed_mask()

    # Read once for all ranks: another run may write meanwhile, and then ranks would disagree on what to compute.
    cache_key, layout, cached_mask = broadcast_from_main(accelerator, open_on_main)
    store = open_store(cache_key, layout, log)
    settings = {item.name: getattr(batches, item.name) for item in fields(batches)}
    note = (
        f"{describe_store(layout, store.directory)}, in {dtype}: {int(cached_mask.sum()):,} of {layout.num_examples:,} "
        "examples were cached before the first step; the others are computed once"
    )
    cached_batches = CachedFeatureBatches(**settings, cached_mask=cached_mask)
    return CachedTraining(CachedFeatureLoss(loss, store), cached_batches, (note,))
