"""Try a method on a small copy of an architecture: do training, packing, checkpointing, merging and saving work?

The answers determine padding, refusals and notes of a run, before its model is loaded. They hold for the model itself,
since they depend on the kinds of its layers and not on their number. The tests of peft's types use the same trial.
"""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from peftbench.common.text import first_line
from peftbench.data.collate import Collator, MicroBatch
from peftbench.errors import UnsupportedModelError
from peftbench.methods.small_copy import identify
from peftbench.profiler.flop_counter import FlopCounter
from peftbench.profiler.flops import NonLinearFlopsError, UnsupportedFlopsError, count_flops
from peftbench.training.trial_model import (
    DOCUMENT_LENGTHS,
    TOLERANCE,
    SmallCopy,
    TrialModel,
    add_noise,
    apply_to_copy,
    build_trial_batch,
    compute_gradients,
    compute_losses,
    differ,
    find_problem,
    initialize_copy,
    use_one_thread,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from peftbench.methods.base import Method
    from peftbench.recipe.schema import Recipe


@dataclass(frozen=True)
class Trial:
    """Answers of a trial. A problem is the reason why something does not work; None means that it works."""

    trainable_parameters: int = 0
    added_parameters: int = 0
    """Number of scalars that the method adds and does not train, in frozen parameters and buffers."""
    changes_start: bool = False
    """True if the outputs differ from those of the base model before the first step."""
    batching_problem: str | None = None
    """Reason for which an example's outputs depend on the other rows of its batch."""
    packing_problem: str | None = None
    checkpointing_problem: str | None = None
    merging_problem: str | None = None
    saving_problem: str | None = None
    flops_problem: str | None = None
    """Reason for which its FLOPs have no closed form."""
    flops_are_counted: bool = True
    """True if :class:`FlopCounter` counts all FLOPs of a step."""
    meta_problem: str | None = None
    """Reason why it cannot be applied on the meta device, and its memory cannot be planned."""

    def check(self, recipe: Recipe) -> None:
        """Check that the recipe's settings work with the method.

        Raises:
            UnsupportedModelError: one does not.
        """
        kind = recipe.method.kind
        recipe.method.check_quantization(recipe.model.quantization)
        if recipe.train.gradient_checkpointing and self.checkpointing_problem:
            raise UnsupportedModelError(
                f"train.gradient_checkpointing=true does not work with method.kind={kind} on this architecture: "
                f"{self.checkpointing_problem}; set it to false"
            )
        if recipe.save_model and self.saving_problem:
            raise UnsupportedModelError(
                f"a model trained with method.kind={kind} cannot be saved: {self.saving_problem}; set save_model=false"
            )

    def list_notes(self, recipe: Recipe) -> list[str]:
        """Return notes for the record."""
        notes = []
        if self.changes_start:
            notes.append(f"{recipe.method.kind} changes the base model's outputs before the first step")
        if self.batching_problem:
            notes.append(f"losses depend on batch sizes: {self.batching_problem}")
        return notes

    @property
    def mask_reason(self) -> str | None:
        """Reason for which sequences must not share a row; None if they may."""
        return self.packing_problem


NO_TRIAL = Trial()
"""The trial of a method that needs none."""


_trials: dict[tuple[str, str], Trial] = {}


def try_method(method: Method, config: PreTrainedConfig) -> Trial:
    """Return the answers for a method and an architecture; each pair is tried once in a process.

    A method that needs no trial is not tried.

    Raises:
        UnsupportedModelError: the method cannot be applied, or it trains nothing, or the model ignores it.
    """
    if not method.needs_trial:
        return NO_TRIAL
    key = (method.model_dump_json(), identify(config))
    if key not in _trials:
        with torch.random.fork_rng(), warnings.catch_warnings(), use_one_thread():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            _trials[key] = _try(method, config)
    return _trials[key]


def _try(method: Method, config: PreTrainedConfig) -> Trial:
    try:
        method = method.reduce_for_trial()
        return _try_on_copy(method, SmallCopy(config, method.resolve_targets(config).copy_size))  # type: ignore[attr-defined]
    except UnsupportedModelError:
        raise
    except Exception as error:  # code of peft and of the architecture may fail in any way
        raise UnsupportedModelError(
            f"method.kind={method.kind} fails on a small copy of {config.model_type}: {first_line(error)}; use "
            "another method"
        ) from error


def _try_on_copy(method: Method, source: SmallCopy) -> Trial:
    base = source.build()
    batch = build_trial_batch(base, method)
    expected = compute_losses(
        TrialModel(base, base, method), build_trial_batch(base, method, virtual=False), use_masks=True
    )
    before = _count_values(base)
    with _FunctionNames() as called:
        subject = apply_to_copy(base, method)
    initialize_copy(subject)
    trained = {name: parameter for name, parameter in subject.model.named_parameters() if parameter.requires_grad}
    _check_gradients(subject, batch, trained)
    num_trained = sum(parameter.numel() for parameter in trained.values())
    start = compute_losses(subject, batch)
    add_noise(trained)
    with called:
        moved = compute_losses(subject, batch)
    effect = float((moved - start).norm())
    if not math.isfinite(effect):
        raise UnsupportedModelError(
            f"method.kind={method.kind} gives losses in {base.config.model_type} that are not finite; use another "
            "method"
        )
    if effect <= TOLERANCE * float(start.norm()):
        raise UnsupportedModelError(
            f"method.kind={method.kind} changes nothing in {base.config.model_type}: new values of its {num_trained:,} "
            "trained parameters give the same losses; use another method"
        )
    flops_problem, flops_are_counted = _check_flops(subject)
    return Trial(
        trainable_parameters=num_trained,
        added_parameters=_count_values(subject.model) - before - num_trained,
        changes_start=differ(expected, start),
        batching_problem=find_problem(lambda: _check_batching(subject, moved, effect)),
        packing_problem=find_problem(lambda: _check_packing(subject, moved, effect)),
        checkpointing_problem=find_problem(lambda: _check_checkpointing(subject, batch)),
        saving_problem=find_problem(lambda: _check_saving(subject, source, batch, moved, effect)),
        merging_problem=find_problem(lambda: _check_merging(subject, batch, moved, effect)),
        flops_problem=flops_problem,
        flops_are_counted=flops_are_counted,
        meta_problem=find_problem(lambda: _check_meta(method, source, called.names)),
    )


def _check_batching(subject: TrialModel, together: torch.Tensor, effect: float) -> str | None:
    batches = [
        build_trial_batch(subject.base, subject.method, rows=slice(row, row + 1))
        for row in range(len(DOCUMENT_LENGTHS))
    ]
    alone = torch.cat([compute_losses(subject, batch) for batch in batches])
    return "an example's outputs depend on the other rows of its batch" if differ(alone, together, effect) else None


def _check_packing(subject: TrialModel, separate: torch.Tensor, effect: float) -> str | None:
    loss = subject.build_loss(use_masks=False)
    if loss.uses_masks:
        return None  # the model itself needs masks, with any method
    try:
        packed = compute_losses(subject, build_trial_batch(subject.base, subject.method, packed=True), use_masks=False)
    except Exception:  # code of peft fails in several ways on rows that it does not expect
        return "documents cannot share a row with what it puts in front of them"
    return "documents that share a row change each other's outputs" if differ(separate, packed, effect) else None


def _check_checkpointing(subject: TrialModel, batch: MicroBatch) -> str | None:
    plain = compute_gradients(subject, batch)
    subject.base.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        recomputed = compute_gradients(subject, batch)
    finally:
        subject.base.gradient_checkpointing_disable()
    same = len(plain) == len(recomputed) and not any(map(differ, plain, recomputed))
    return None if same else "recomputed activations give other gradients"


def _check_saving(
    subject: TrialModel, source: SmallCopy, batch: MicroBatch, expected: torch.Tensor, effect: float
) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        subject.method.save(subject.model, Path(folder))
        loaded = apply_to_copy(source.build(), subject.method)
        subject.method.load(loaded.model, Path(folder))
    losses = compute_losses(loaded, batch)
    return "the saved adapter gives other outputs when it is loaded" if differ(expected, losses, effect) else None


def _check_merging(subject: TrialModel, batch: MicroBatch, expected: torch.Tensor, effect: float) -> str | None:
    if not subject.method.merges_into_base or not hasattr(subject.model, "merge_and_unload"):
        return "its trained part is not an update of weights"
    merged = copy.deepcopy(subject.model).merge_and_unload()  # type: ignore[operator]
    losses = compute_losses(TrialModel(merged, merged, subject.method), batch)
    return "the merged weights give other outputs" if differ(expected, losses, effect) else None


def _check_gradients(subject: TrialModel, batch: MicroBatch, trained: dict[str, nn.Parameter]) -> None:
    """Check that the loss depends on everything that is trained.

    Raises:
        UnsupportedModelError: a trained parameter gets no gradient, for which an engine such as DDP would wait.
    """
    loss = subject.build_loss(use_masks=True)
    subject.method.set_training(subject.model)
    with loss.attention_context():
        gradients = torch.autograd.grad(loss(subject.model, batch), list(trained.values()), allow_unused=True)
    unused = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
    if unused:
        raise UnsupportedModelError(
            f"method.kind={subject.method.kind} trains parameters that the loss does not depend on (architecture "
            f"{subject.base.config.model_type}), e.g. {unused[0]}; use another method"
        )


def _check_flops(subject: TrialModel) -> tuple[str | None, bool]:
    """Compare the closed form of a step's FLOPs with a count; return a reason, and whether a count has all of them."""
    loss, method = subject.build_loss(use_masks=True), subject.method
    batch = build_trial_batch(subject.base, method, rows=slice(1))
    units = Collator(0, method.virtual_tokens).hardware_flop_units(batch)
    method.set_training(subject.model)
    with loss.attention_context():
        try:
            cost = count_flops(
                subject.model,
                subject.base,
                virtual_tokens=method.virtual_tokens,
                gradient_checkpointing=False,
                computes_all_logits=True,
                compute_penalty=partial(method.compute_penalty, subject.model),
            )
        except UnsupportedFlopsError as error:
            return str(error), isinstance(error, NonLinearFlopsError)
        with FlopCounter() as counter:
            value, penalty = loss(subject.model, batch), method.compute_penalty(subject.model)
            (value if penalty is None else value + penalty).backward()  # type: ignore[no-untyped-call]
    subject.model.zero_grad()
    if counter.total_flops is None:
        return "a kernel's FLOPs are unknown", False
    if counter.total_flops == cost.compute_hardware_flops(units):
        return None, True
    return "a function of the method computes its own backward pass", True


def _check_meta(method: Method, source: SmallCopy, called: set[str]) -> str | None:
    """Apply the method on the meta device; ``called`` has the functions that it calls when applied and in a forward."""
    if method.initialization is not None:
        return "its initial values are computed before the first step, and the memory of that is not modeled"
    for name in called & _UNPLANNED_FUNCTIONS.keys():
        return _UNPLANNED_FUNCTIONS[name]
    apply_to_copy(source.build().to("meta"), method)  # type: ignore[arg-type]
    return None


_UNPLANNED_FUNCTIONS = {
    "linalg_solve": "it solves linear systems, and the buffers of solvers are not modeled",
    "linalg_svd": "it decomposes weights, and the layout of the factors in memory is not modeled",
}
"""Functions whose memory on a real device differs from that of their results on the meta device."""


class _FunctionNames(TorchFunctionMode):
    """Records the names of torch's functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def _count_values(model: nn.Module) -> int:
    """Return the number of values of all parameters and buffers; a shared tensor counts once."""
    tensors = {id(tensor): tensor.numel() for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
