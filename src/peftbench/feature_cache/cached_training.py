"""Training over a frozen trunk's stored hidden states: each example passes the trunk once, and then the head alone.

The order of examples, the steps and the counts stay what they are. All ranks know from the plan which examples have
been computed in an earlier step, by whichever rank, so all agree on what is computed without asking each other: the
reduction that ends each step is after all writes in it.
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
from peftbench.feature_cache.key import build_cache_key, hash_examples
from peftbench.feature_cache.store import STORAGE_DTYPES, FeatureStore, StoreLayout, describe_store, open_store
from peftbench.modeling.loss import CausalLMLoss, LabelledLogitsLoss, select_positions

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from peftbench.recipe.schema import Recipe


class CachedFeatureLoss(CausalLMLoss):
    """The loss of a model whose trunk is skipped where its hidden states are stored.

    The whole model is called either way, in whatever wrappers an engine has put it, so that gradients are averaged as
    always and what a model does with its logits is done. In its middle the trunk's forward pass is replaced, which then
    gives what it gave for one token, and the head is given the stored states. States that are computed are rounded to
    the stored type too, so that a step's loss does not depend on where they came from.
    """

    computes_all_logits = False

    def __init__(self, inner: LabelledLogitsLoss, store: FeatureStore) -> None:
        self.base, self.mask_reason, self.uses_masks = inner.base, inner.mask_reason, inner.uses_masks
        self.inner, self.store = inner, store
        self._step_inputs: _StepInputs | None = None
        trunk: nn.Module = inner.base.base_model
        with torch.no_grad():
            token = torch.zeros((1, 1), dtype=torch.long, device=inner.base.device)
            self._single_token_output = trunk(input_ids=token, use_cache=False)
        self._backbone_forward = trunk.forward
        trunk.forward = self._forward_backbone_or_skip
        inner.select_positions = self._select_features

    def attention_context(self) -> AbstractContextManager[None]:
        return self.inner.attention_context()

    def logits(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        return self.inner.logits(model, batch)

    def __call__(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        if batch.feature_mode == "computed":
            return self.inner(model, batch)
        device = batch.targets.device
        states = None
        if batch.feature_mode == "stored":
            read = self.store.read(batch.example_indices, pin_memory=device.type == "cuda")
            states = read.to(device, non_blocking=True).float()
        self._step_inputs = _StepInputs(batch, states)
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
    """What is being computed."""

    batch: MicroBatch
    features: torch.Tensor | None
    """At labelled positions (labelled, width) in float32; None where the trunk is to compute them."""


@dataclass(frozen=True)
class CachedFeatureBatches(Batches):
    """The same batches, each micro-batch marked with where its hidden states come from."""

    cached_mask: torch.Tensor = field(kw_only=True)
    """Which examples' states are stored before the next global batch, bool; kept up to date by :meth:`batch`."""

    def skip_first_batches(self, num_batches: int) -> Iterator[GlobalBatch]:
        return Batches.skip_first_batches(replace(self, cached_mask=self.cached_mask.clone()), num_batches)

    def build_batch(self, indices: Sequence[int]) -> GlobalBatch:
        made = super().build_batch(indices)
        self.cached_mask[list(indices)] = True  # by the time the next one is computed
        return made

    def collate(self, examples: Sequence[tuple[Sequence[int], int, int]]) -> MicroBatch:
        made = super().collate(examples)
        return replace(
            made, feature_mode="stored" if bool(self.cached_mask[list(made.example_indices)].all()) else "kept"
        )

    def hardware_flop_units(self, micro_batch: MicroBatch) -> FlopUnits:
        """Nothing of the trunk where it is skipped."""
        if micro_batch.feature_mode == "stored":
            return FlopUnits(labelled=len(micro_batch.targets))
        return super().hardware_flop_units(micro_batch)


@dataclass(frozen=True)
class CachedTraining:
    """What a training over a store is driven with."""

    loss: CachedFeatureLoss
    batches: CachedFeatureBatches
    notes: tuple[str, ...]


def open_feature_cache(
    recipe: Recipe, base: PreTrainedModel, loss: CausalLMLoss, batches: Batches, accelerator: Accelerator
) -> CachedTraining:
    """Open the store of this trunk's hidden states, or make it, and train over it; all ranks must come here.

    Its size is told on standard error before it is made.

    Raises:
        UnsupportedModelError: the model has no trunk apart from its head.
        OutputError, DiskFullError: there is no place for the store.
    """
    stored = recipe.train.feature_cache
    assert stored is not None, "it is asked for"
    if not isinstance(loss, LabelledLogitsLoss) or base.base_model is base:
        raise UnsupportedModelError(
            f"{base.config.model_type} has no trunk apart from its head, whose output could be kept; set "
            "train.feature_cache=null"
        )

    trunk: nn.Module = base.base_model
    assert not trunk.training, "a frozen trunk gives the same in every epoch, and dropout would not"
    assert not any(parameter.requires_grad for parameter in trunk.parameters()), "nor would weights that are trained"

    def announce(said: str) -> None:
        tqdm.write(said, file=sys.stderr)

    def opened() -> tuple[dict[str, Any], StoreLayout, torch.Tensor]:
        examples, counts = hash_examples(batches.dataset)
        of = build_cache_key(recipe, base, examples, accelerator.device, uses_masks=loss.uses_masks)
        layout = StoreLayout(counts, loss.head.get_parameter("weight").shape[-1], stored)
        return of, layout, open_store(of, layout, announce).completed_mask()

    # By one for all: others would see what another run has written meanwhile, and compute less than the first.
    of, layout, there = broadcast_from_main(accelerator, opened)
    store = open_store(of, layout, announce)
    same = {knob.name: getattr(batches, knob.name) for knob in fields(batches)}
    note = (
        f"{describe_store(layout, store.directory)}, in {stored}: those of {int(there.sum()):,} of {layout.num_examples:,} examples "
        "were there before the first step, and all others are computed once"
    )
    over_store = CachedFeatureBatches(**same, cached_mask=there)
    return CachedTraining(CachedFeatureLoss(loss, store), over_store, (note,))
