"""One instance of every method and preset, and parametrize marks over methods and architectures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.methods.select import Select
from peftbench.methods.select_presets import Attention, BitFit, Embeddings, LastBlocks, LayerNorm
from tests.helpers.models import ARCHITECTURES
from tests.helpers.sweeps import mark_others_slow

if TYPE_CHECKING:
    from peftbench.optim import Optimizer

ONE_OF_EACH: dict[str, Method] = {
    "full": Full(),
    "last_layer": LastLayer(),
    "lora": Lora(r=4),
    "prompt_tuning": PromptTuning(num_virtual_tokens=5),
    "select": Select(train=r".*\.1\..*"),  # the second block
}
"""One instance of every method that is not in ``PRESETS``, with few changed keys."""

PRESETS: dict[str, Method] = {
    "bitfit": BitFit(),
    "layer_norm": LayerNorm(),
    "embeddings": Embeddings(),
    "last_blocks": LastBlocks(),
    "attention": Attention(),
}
"""Methods that differ from one in ``ONE_OF_EACH`` only in the parameters that they train; tests of them are slow.

The conformance tests check that each method is in one of the two.
"""


def method_for(optimizer: Optimizer) -> Method:
    """Return a method that the optimizer can train: LoRA if it needs its matrices, else full fine-tuning."""
    return ONE_OF_EACH["lora" if optimizer.needs_lora else "full"]


every_method = pytest.mark.parametrize("method", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
"""Run a test with every method, in one variant each."""


def one_method_fast(*fast: str) -> pytest.MarkDecorator:
    """Run a test with every method; those not named in ``fast`` are slow."""
    return pytest.mark.parametrize("method", mark_others_slow(ONE_OF_EACH, *fast))


every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
"""Run a test with every small architecture."""
