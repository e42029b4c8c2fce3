"""A forward pass that finds out what a model does, and leaves no trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def isolated_forward(base: PreTrainedModel) -> Iterator[None]:
    """Within it nothing is dropped out; after it each module has the attributes that it had before.

    Layers of bitsandbytes are left as in training: in evaluation those in four bits pack their weights anew on some
    CPUs, for good, and cannot be trained over any more. And they take the type that they compute in from the first
    input they see, which is to be a run's. Weights of more than one type (a head kept in bf16 over a trunk in float32)
    are multiplied in the lower one, as they are in a run.
    """
    from transformers.utils import generic

    before = [(module, dict(vars(module))) for module in base.modules()]
    for module, _ in before:
        module.training = type(module).__module__.startswith("bitsandbytes.")
    types = {parameter.dtype for parameter in base.parameters() if parameter.is_floating_point()}
    try:
        several = torch.bfloat16 in types and len(types) > 1
        with generic.maybe_autocast(base.device.type, enabled=several, dtype=torch.bfloat16):
            yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
