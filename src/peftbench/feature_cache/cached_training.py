"""Train on stored hidden states: the frozen part of the model processes each example once.

The order of examples, the steps and all counts stay the same. Every rank derives from the batch order which examples an
earlier step has computed on any rank, so ranks agree on what to compute without communication: the all-reduce at the
end of a step follows all writes of that step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from peftbench.data.batches import Batches, GlobalBatch
from peftbench.data.collate import FlopUnits, MicroBatch
from peftbench.distributed.collectives import broadcast_from_main
from peftbench.feature_cache.cut import Cut, build_cut
from peftbench.feature_cache.key import build_cache_key, hash_encoded_examples
from peftbench.feature_cache.store import FeatureStore, StoreLayout, describe_store, open_store
from peftbench.modeling.loss import CausalLMLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftbench.distributed.accelerator import AcceleratorContext
    from peftbench.methods.frozen_part import FrozenPart
    from peftbench.recipe.schema import Recipe


class CachedFeatureLoss(CausalLMLoss):
    """Loss of a model that skips everything below a cut if the hidden states at the cut are stored.

    Computed states are rounded to the stored dtype too, so a step's loss does not depend on whether its states were
    computed or loaded.
    """

    def __init__(self, inner: CausalLMLoss, store: FeatureStore, cut: Cut) -> None:
        self.base, self.mask_reason, self.uses_masks = inner.base, inner.mask_reason, inner.uses_masks
        self.computes_all_logits = inner.computes_all_logits
        self.inner, self.store, self.cut = inner, store, cut

    def attention_context(self) -> AbstractContextManager[None]:
        return self.inner.attention_context()

    def logits(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        return self.inner.logits(model, batch)

    def __call__(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        with self._use_store(batch):
            return self.inner(model, batch)

    def _use_store(self, batch: MicroBatch) -> AbstractContextManager[None]:
        """Return the context in which the states of ``batch`` are computed, saved or loaded."""
        if batch.feature_mode == "recompute":
            return nullcontext()
        if batch.feature_mode == "save":
            return self.cut.save(batch, self.store.layout.dtype, partial(self.store.write, batch.example_indices))
        device = batch.targets.device
        stored = self.store.read(batch.example_indices, pin_memory=device.type == "cuda")
        return self.cut.load(batch, stored.to(device, non_blocking=True))


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

    def skipped_flop_units(self, micro_batch: MicroBatch) -> FlopUnits:
        """Return the work that the frozen part skips: all of it if its states are loaded."""
        if micro_batch.feature_mode == "load":
            return self.hardware_flop_units(micro_batch)
        return super().skipped_flop_units(micro_batch)


@dataclass(frozen=True)
class CachedTraining:
    """Replacements of loss and batches in a training run over a feature store."""

    loss: CachedFeatureLoss
    batches: CachedFeatureBatches
    notes: tuple[str, ...]


def open_feature_cache(
    recipe: Recipe,
    base: PreTrainedModel,
    part: FrozenPart,
    loss: CausalLMLoss,
    batches: Batches,
    *,
    context: AcceleratorContext,
) -> CachedTraining:
    """Open or create the store of the hidden states of a frozen part; a collective: all ranks must call it.

    Logs the store's size on standard error before creating it.

    Raises:
        UnsupportedModelError: stored states cannot replace the frozen part of this model.
        OutputError, DiskFullError: the store's folder is not writable or the disk is too full.
    """
    dtype = recipe.train.feature_cache
    assert dtype is not None, "train.feature_cache is set"
    cut = build_cut(base, part, loss, context.autocast)
    for module in part.list_modules(base):
        assert not any(child.training for child in module.modules()), "dropout would change the states in each epoch"
        assert not any(parameter.requires_grad for parameter in module.parameters()), "so would trainable weights"
    accelerator = context.accelerator

    def log(message: str) -> None:
        tqdm.write(message, file=sys.stderr)

    def open_on_main() -> tuple[dict[str, Any], StoreLayout, torch.Tensor]:
        examples_hash, counts = hash_encoded_examples(batches.dataset)
        cache_key = build_cache_key(recipe, base, part, examples_hash, accelerator.device, uses_masks=loss.uses_masks)
        layout = StoreLayout(counts[cut.position_kind], cut.hidden_size, dtype, cut.position_kind)
        return cache_key, layout, open_store(cache_key, layout, log).completed_mask()

    # Read once for all ranks: another run may write meanwhile, and then ranks would disagree on what to compute.
    cache_key, layout, cached_mask = broadcast_from_main(accelerator, open_on_main)
    store = open_store(cache_key, layout, log)
    settings = {item.name: getattr(batches, item.name) for item in fields(batches)}
    note = (
        f"{describe_store(layout, store.directory)}, in {dtype}: {int(cached_mask.sum()):,} of {layout.num_examples:,} "
        f"examples were cached before the first step; the others are computed once; {part.describe()}"
    )
    cached_batches = CachedFeatureBatches(**settings, cached_mask=cached_mask)
    return CachedTraining(CachedFeatureLoss(loss, store, cut), cached_batches, (note,))
