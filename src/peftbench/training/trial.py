"""Try a method on a small copy of an architecture: do training, packing, checkpointing, merging and saving work?

The answers determine padding, refusals and notes of a run, before its model is loaded. They hold for the model itself,
since they depend on the kinds of its layers and not on their number. The tests of peft's types use the same trial.
"""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from peftbench.common.text import first_line
from peftbench.data.collate import Collator, MicroBatch, PaddingFreeCollator
from peftbench.errors import UnsupportedModelError
from peftbench.methods.initialization import InitializationPass
from peftbench.methods.small_copy import CopySize, build_small_copy, identify
from peftbench.modeling.loading import load_config
from peftbench.modeling.loss import CausalLMLoss, build_loss
from peftbench.profiler.flop_counter import FlopCounter
from peftbench.profiler.flops import NonLinearFlopsError, UnsupportedFlopsError, count_flops

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from peftbench.methods.base import Method
    from peftbench.recipe.schema import Recipe

_LENGTHS = (9, 6)
_MIN_DOCUMENTS = 8
"""Smallest number of documents from which initial values are computed."""
_NOISE = 0.1
"""Standard deviation of the noise that is added to the trained parameters, to change their initial values."""
_TOLERANCE, _EFFECT_TOLERANCE = 1e-5, 1e-3
"""Largest difference of two equal results: the part of their norm in float32, plus the part of the method's effect."""


@dataclass(frozen=True)
class Trial:
    """Answers of a trial. A problem is the reason why something does not work; None means that it works."""

    trainable_parameters: int = 0
    added_parameters: int = 0
    """Number of scalars that the method adds and does not train, in frozen parameters and buffers."""
    adapts_quantized: bool = True
    """True if peft adapts a quantized base model with this method."""
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
        if recipe.model.quantization is not None and not self.adapts_quantized:
            raise UnsupportedModelError(
                f"method.kind={kind} does not adapt a quantized base model: peft has no layer for it; set "
                "model.quantization=null, or use method.kind=lora"
            )
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


@dataclass(frozen=True)
class _Subject:
    """A small model with the method applied."""

    base: PreTrainedModel
    model: nn.Module
    method: Method

    def build_loss(self, *, use_masks: bool) -> CausalLMLoss:
        return build_loss(self.base, labeled_only=False, use_masks=use_masks)[0]


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
        with torch.random.fork_rng(), warnings.catch_warnings(), _one_thread():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            _trials[key] = _try(method, config)
    return _trials[key]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: small products take longer on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_method(recipe: Recipe) -> None:
    """Try the recipe's method on its architecture and check the recipe's settings, before any weight is loaded.

    Raises:
        UnsupportedModelError: the method does not work there, or not with these settings.
        ModelError, HubUnreachableError: the model's config cannot be read.
    """
    try_method(recipe.method, load_config(recipe.model)).check(recipe)


def _try(method: Method, config: PreTrainedConfig) -> Trial:
    try:
        return _try_on_copy(method, _Copy(config, method.resolve_targets(config).copy_size))  # type: ignore[attr-defined]
    except UnsupportedModelError:
        raise
    except Exception as error:  # code of peft and of the architecture may fail in any way
        raise UnsupportedModelError(
            f"method.kind={method.kind} fails on a small copy of {config.model_type}: {first_line(error)}; use "
            "another method"
        ) from error


@dataclass(frozen=True)
class _Copy:
    """A recipe for equal copies of an architecture."""

    config: PreTrainedConfig
    size: CopySize

    def build(self) -> PreTrainedModel:
        return build_small_copy(self.config, self.size)


def _try_on_copy(method: Method, source: _Copy) -> Trial:
    base = source.build()
    batch = _build_batch(base, method)
    expected = _compute_losses(_Subject(base, base, method), _build_batch(base, method, virtual=False), use_masks=True)
    before = _count_values(base)
    with _FunctionNames() as called:
        subject = _apply(base, method)
    _initialize(subject)
    trained = {name: parameter for name, parameter in subject.model.named_parameters() if parameter.requires_grad}
    _check_gradients(subject, batch, trained)
    num_trained = sum(parameter.numel() for parameter in trained.values())
    start = _compute_losses(subject, batch, use_masks=True)
    _add_noise(trained)
    with called:
        moved = _compute_losses(subject, batch, use_masks=True)
    effect = float((moved - start).norm())
    if not math.isfinite(effect):
        raise UnsupportedModelError(
            f"method.kind={method.kind} gives losses in {base.config.model_type} that are not finite; use another "
            "method"
        )
    if effect <= _TOLERANCE * float(start.norm()):
        raise UnsupportedModelError(
            f"method.kind={method.kind} changes nothing in {base.config.model_type}: new values of its {num_trained:,} "
            "trained parameters give the same losses; use another method"
        )
    flops_problem, flops_are_counted = _check_flops(subject)
    return Trial(
        trainable_parameters=num_trained,
        added_parameters=_count_values(subject.model) - before - num_trained,
        adapts_quantized=bool(getattr(method, "adapts_quantized", True)),
        changes_start=_differ(expected, start),
        batching_problem=_find_problem(lambda: _check_batching(subject, moved, effect)),
        packing_problem=_find_problem(lambda: _check_packing(subject, moved, effect)),
        checkpointing_problem=_find_problem(lambda: _check_checkpointing(subject, batch)),
        saving_problem=_find_problem(lambda: _check_saving(subject, source, batch, moved, effect)),
        merging_problem=_find_problem(lambda: _check_merging(subject, batch, moved, effect)),
        flops_problem=flops_problem,
        flops_are_counted=flops_are_counted,
        meta_problem=_find_problem(lambda: _check_meta(method, source, called.names)),
    )


def _apply(base: PreTrainedModel, method: Method) -> _Subject:
    torch.manual_seed(0)  # the same initial values in every copy
    return _Subject(base, method.apply(base, None), method)  # type: ignore[arg-type] # a small model has no tokenizer


def _initialize(subject: _Subject) -> None:
    """Compute and set the method's initial values on random documents; a copy is not quantized."""
    needs = subject.method.initialization
    if needs is None:
        return
    length, vocabulary = _LENGTHS[0], int(subject.base.config.vocab_size)
    documents = torch.randint(vocabulary, (max(_MIN_DOCUMENTS, 2 * needs.tokens // (length - 1) + 1), length)).tolist()
    loss = subject.build_loss(use_masks=True)

    def collate(indices: Sequence[int]) -> MicroBatch:
        return Collator(0).collate([documents[index] for index in indices], [(1, length)] * len(indices))

    def compute_loss(batch: MicroBatch) -> torch.Tensor:
        with loss.attention_context():
            return loss(subject.model, batch)

    data = InitializationPass(len(documents), collate, compute_loss)
    subject.method.set_initial_values(subject.model, subject.method.compute_initial_values(subject.model, data))


def _build_batch(
    base: PreTrainedModel, method: Method, *, packed: bool = False, virtual: bool = True, rows: slice = slice(None)
) -> MicroBatch:
    """Return two documents, or one of them, each labeled from its second token on.

    They contain the tokens that the recipe names. ``virtual`` leaves room for the method's virtual tokens.
    """
    vocabulary = int(base.config.vocab_size)
    ids = [(index * 7 + 3) % vocabulary for index in range(sum(_LENGTHS))]
    named = [token for token in getattr(method, "tried_tokens", ()) if token < vocabulary][: _LENGTHS[0] - 1]
    ids[: len(named)] = named
    documents = [ids[: _LENGTHS[0]], ids[_LENGTHS[0] :]][rows]
    collator = (PaddingFreeCollator if packed else Collator)(0, method.virtual_tokens if virtual else 0)
    return collator.collate(documents, [(1, len(document)) for document in documents])


def _compute_losses(subject: _Subject, batch: MicroBatch, *, use_masks: bool) -> torch.Tensor:
    """Return the loss of each labeled token in evaluation mode."""
    loss = subject.build_loss(use_masks=use_masks)
    subject.model.eval()
    with loss.attention_context():
        return loss.per_token(subject.model, batch)


def _compute_gradients(subject: _Subject, batch: MicroBatch) -> list[torch.Tensor]:
    """Return the gradients of what is trained, in training mode."""
    loss = subject.build_loss(use_masks=True)
    subject.method.set_training(subject.model)
    trained = [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
    torch.manual_seed(0)  # dropout
    with loss.attention_context():
        value = loss(subject.model, batch)
        gradients = torch.autograd.grad(value, trained, allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]


def _add_noise(trained: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=_NOISE)


def _differ(one: torch.Tensor, other: torch.Tensor, effect: float = 0.0) -> bool:
    """True if two tensors differ by more than rounding; a value that is not finite differs from all.

    ``effect`` is the norm of the method's effect on them.
    """
    return not bool((one - other).norm() <= _TOLERANCE * one.norm() + _EFFECT_TOLERANCE * effect)


def _find_problem(check: Callable[[], str | None]) -> str | None:
    """Return the reason that a check gives, or the error that it ends with."""
    try:
        return check()
    except Exception as error:  # code of peft and of the architecture may fail in any way
        return f"{type(error).__name__}: {first_line(error)}"


def _check_batching(subject: _Subject, together: torch.Tensor, effect: float) -> str | None:
    batches = [_build_batch(subject.base, subject.method, rows=slice(row, row + 1)) for row in range(len(_LENGTHS))]
    alone = torch.cat([_compute_losses(subject, batch, use_masks=True) for batch in batches])
    return "an example's outputs depend on the other rows of its batch" if _differ(alone, together, effect) else None


def _check_packing(subject: _Subject, separate: torch.Tensor, effect: float) -> str | None:
    loss = subject.build_loss(use_masks=False)
    if loss.uses_masks:
        return None  # the model itself needs masks, with any method
    try:
        packed = _compute_losses(subject, _build_batch(subject.base, subject.method, packed=True), use_masks=False)
    except Exception:  # code of peft fails in several ways on rows that it does not expect
        return "documents cannot share a row with what it puts in front of them"
    return "documents that share a row change each other's outputs" if _differ(separate, packed, effect) else None


def _check_checkpointing(subject: _Subject, batch: MicroBatch) -> str | None:
    plain = _compute_gradients(subject, batch)
    subject.base.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        recomputed = _compute_gradients(subject, batch)
    finally:
        subject.base.gradient_checkpointing_disable()
    same = len(plain) == len(recomputed) and not any(map(_differ, plain, recomputed))
    return None if same else "recomputed activations give other gradients"


def _check_saving(
    subject: _Subject, source: _Copy, batch: MicroBatch, expected: torch.Tensor, effect: float
) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        subject.method.save(subject.model, Path(folder))
        loaded = _apply(source.build(), subject.method)
        subject.method.load(loaded.model, Path(folder))
    losses = _compute_losses(loaded, batch, use_masks=True)
    return "the saved adapter gives other outputs when it is loaded" if _differ(expected, losses, effect) else None


def _check_merging(subject: _Subject, batch: MicroBatch, expected: torch.Tensor, effect: float) -> str | None:
    if not subject.method.merges_into_base or not hasattr(subject.model, "merge_and_unload"):
        return "its trained part is not an update of weights"
    merged = copy.deepcopy(subject.model).merge_and_unload()  # type: ignore[operator]
    losses = _compute_losses(_Subject(merged, merged, subject.method), batch, use_masks=True)
    return "the merged weights give other outputs" if _differ(expected, losses, effect) else None


def _check_gradients(subject: _Subject, batch: MicroBatch, trained: dict[str, nn.Parameter]) -> None:
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


def _check_flops(subject: _Subject) -> tuple[str | None, bool]:
    """Compare the closed form of a step's FLOPs with a count; return a reason, and whether a count has all of them."""
    loss, method = subject.build_loss(use_masks=True), subject.method
    batch = _build_batch(subject.base, method, rows=slice(1))
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


def _check_meta(method: Method, source: _Copy, called: set[str]) -> str | None:
    """Apply the method on the meta device; ``called`` has the functions that it calls when applied and in a forward."""
    if method.initialization is not None:
        return "its initial values are computed before the first step, and the memory of that is not modeled"
    for name in called & _UNPLANNED_FUNCTIONS.keys():
        return _UNPLANNED_FUNCTIONS[name]
    _apply(source.build().to("meta"), method)  # type: ignore[arg-type]
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
