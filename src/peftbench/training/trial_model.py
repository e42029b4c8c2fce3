"""A small model with a method applied: its batches, losses and gradients, which trials of the method compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peftbench.common.text import first_line
from peftbench.data.collate import Collator, MicroBatch, PaddingFreeCollator
from peftbench.errors import PeftbenchError
from peftbench.methods.initialization import InitializationPass
from peftbench.methods.small_copy import CopySize, build_small_copy
from peftbench.modeling.loss import CausalLMLoss, build_loss

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from peftbench.methods.base import Method

DOCUMENT_LENGTHS = (9, 6)
_MIN_DOCUMENTS = 8
"""Smallest number of documents from which initial values are computed."""
_NOISE = 0.1
"""Standard deviation of the noise that is added to the trained parameters, to change their initial values."""
TOLERANCE, EFFECT_TOLERANCE = 1e-5, 1e-3
"""Largest difference of two equal results: the part of their norm in float32, plus the part of the method's effect."""


@dataclass(frozen=True)
class TrialModel:
    """A small model with the method applied."""

    base: PreTrainedModel
    model: nn.Module
    method: Method

    def build_loss(self, *, use_masks: bool) -> CausalLMLoss:
        return build_loss(self.base, labeled_only=False, use_masks=use_masks)[0]


@dataclass(frozen=True)
class SmallCopy:
    """A recipe for equal copies of an architecture."""

    config: PreTrainedConfig
    size: CopySize

    def build(self) -> PreTrainedModel:
        return build_small_copy(self.config, self.size)


@contextmanager
def use_one_thread() -> Iterator[None]:
    """Compute on one thread: small products take longer on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def apply_to_copy(base: PreTrainedModel, method: Method) -> TrialModel:
    """Apply a method to a small model, with the same new values in every copy."""
    torch.manual_seed(0)
    return TrialModel(base, method.apply(base, None), method)  # type: ignore[arg-type] # a small model has no tokenizer


def initialize_copy(subject: TrialModel) -> None:
    """Compute and set the initial values of a method that needs data, on random documents."""
    needs = subject.method.initialization
    if needs is None:
        return
    length, vocabulary = DOCUMENT_LENGTHS[0], int(subject.base.config.vocab_size)
    documents = torch.randint(vocabulary, (max(_MIN_DOCUMENTS, 2 * needs.tokens // (length - 1) + 1), length)).tolist()
    loss = subject.build_loss(use_masks=True)

    def collate(indices: Sequence[int]) -> MicroBatch:
        return Collator(0).collate([documents[index] for index in indices], [(1, length)] * len(indices))

    def compute_loss(batch: MicroBatch) -> torch.Tensor:
        with loss.attention_context():
            return loss(subject.model, batch)

    data = InitializationPass(len(documents), collate, compute_loss)
    subject.method.set_initial_values(subject.model, subject.method.compute_initial_values(subject.model, data))


def build_trial_batch(
    base: PreTrainedModel, method: Method, *, packed: bool = False, virtual: bool = True, rows: slice = slice(None)
) -> MicroBatch:
    """Return two documents, or one of them, each labeled from its second token on.

    They contain the tokens that the recipe names. ``virtual`` leaves room for the method's virtual tokens.
    """
    vocabulary = int(base.config.vocab_size)
    ids = [(index * 7 + 3) % vocabulary for index in range(sum(DOCUMENT_LENGTHS))]
    named = [token for token in getattr(method, "tried_tokens", ()) if token < vocabulary][: DOCUMENT_LENGTHS[0] - 1]
    ids[: len(named)] = named
    documents = [ids[: DOCUMENT_LENGTHS[0]], ids[DOCUMENT_LENGTHS[0] :]][rows]
    collator = (PaddingFreeCollator if packed else Collator)(0, method.virtual_tokens if virtual else 0)
    return collator.collate(documents, [(1, len(document)) for document in documents])


def compute_losses(subject: TrialModel, batch: MicroBatch, *, use_masks: bool = True) -> torch.Tensor:
    """Return the loss of each labeled token in evaluation mode."""
    loss = subject.build_loss(use_masks=use_masks)
    subject.model.eval()
    with loss.attention_context():
        return loss.per_token(subject.model, batch)


def compute_gradients(
    subject: TrialModel, batch: MicroBatch, autocast_dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Return the gradients of what is trained, in training mode; autocast contains the forward pass alone."""
    loss = subject.build_loss(use_masks=True)
    subject.method.set_training(subject.model)
    trained = [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
    torch.manual_seed(0)  # dropout
    autocast = nullcontext() if autocast_dtype is None else torch.autocast(batch.targets.device.type, autocast_dtype)
    with loss.attention_context():
        with autocast:
            value = loss(subject.model, batch)
        gradients = torch.autograd.grad(value, trained, allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]


def add_noise(trained: dict[str, nn.Parameter]) -> None:
    """Add the same noise in every copy to the trained parameters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=_NOISE)


def differ(one: torch.Tensor, other: torch.Tensor, effect: float = 0.0) -> bool:
    """True if two tensors differ by more than rounding; a value that is not finite differs from all.

    ``effect`` is the norm of the method's effect on them.
    """
    return not bool((one - other).norm() <= TOLERANCE * one.norm() + EFFECT_TOLERANCE * effect)


def find_problem(check: Callable[[], str | None]) -> str | None:
    """Return the reason that a check gives, or the error that it ends with."""
    try:
        return check()
    except PeftbenchError as error:
        return first_line(error)
    except Exception as error:  # code of peft and of the architecture may fail in any way
        return f"{type(error).__name__}: {first_line(error)}"
