"""Variants of every method, by architecture. A new row of ``METHODS`` needs a row here; every test then includes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.methods.select import Select
from peftbench.methods.select_presets import Attention, BitFit, Embeddings, LastBlocks, LayerNorm
from tests.helpers.methods import PRESETS
from tests.helpers.models import ARCHITECTURES
from tests.helpers.training import trainable_parameters

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftbench.data.collate import MicroBatch

VARIANTS: dict[str, dict[str, Method]] = {
    "full": {"full": Full()},
    "last_layer": {
        "head_untied": LastLayer(),
        "head_tied": LastLayer(head="tied"),
        "head_outside_blocks": LastLayer(head="outside_blocks"),
    },
    "lora": {
        "lora": Lora(r=4, lora_alpha=6),
        "lora_dropout": Lora(r=4, lora_alpha=6, lora_dropout=0.1),
        "lora_dora": Lora(r=4, lora_alpha=6, use_dora=True),
        "lora_rslora": Lora(r=4, lora_alpha=6, use_rslora=True),
        "lora_bias_all": Lora(r=4, lora_alpha=6, bias="all"),
        "lora_bias_lora_only": Lora(r=4, lora_alpha=6, bias="lora_only"),
        # One expression for matrices with more outputs than inputs and with fewer, in both architectures.
        "lora_expression": Lora(
            r=4, lora_alpha=6, target_modules=r".*\.(c_attn|c_fc|q_proj|up_proj|mlp\.c_proj|down_proj)"
        ),
    },
    "prompt_tuning": {
        "prompt_random": PromptTuning(num_virtual_tokens=5),
        "prompt_text": PromptTuning(
            num_virtual_tokens=5,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="Summarize the article above in one sentence.",
        ),
        "prompt_vocabulary": PromptTuning(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB"),
    },
    "select": {
        "select_block": Select(train=r".*\.1\..*"),
        "select_within_block": Select(train=r".*\.1\..*(mlp|post_attention).*|.*\.(ln_f|norm)\.weight"),
        "select_untied_head": Select(train=r"lm_head\.weight", untie_head=True),
    },
    "bitfit": {"bitfit": BitFit()},
    "layer_norm": {"layer_norm": LayerNorm()},
    "embeddings": {"embeddings": Embeddings(), "embeddings_untied": Embeddings(untie_head=True)},
    "last_blocks": {"last_block": LastBlocks(), "last_two_blocks": LastBlocks(num_blocks=2)},
    "attention": {"attention": Attention()},
}
"""Variants of each method that differ in trained parameters or initialization."""

REFUSED = frozenset(
    {
        ("head_tied", "llama_untied"),
        ("head_outside_blocks", "llama_tied"),
        ("head_outside_blocks", "llama_untied"),
        ("bitfit", "llama_tied"),
    }
)
"""Pairs of variant and architecture that a method refuses."""

RATES = {
    "full": 3e-3,
    "last_layer": 3e-2,
    "lora": 2e-2,
    "prompt_tuning": 0.3,
    "select": 3e-2,
    "bitfit": 1e-1,
    "layer_norm": 1e-1,
    "embeddings": 3e-2,
    "last_blocks": 3e-2,
    "attention": 3e-2,
}
"""Learning rates at which each method fits one batch within a few steps."""


@dataclass(frozen=True)
class Case:
    """One variant of one method on one architecture."""

    variant: str
    method: Method
    architecture: str

    def __str__(self) -> str:
        return f"{self.variant}-{self.architecture}"


CASES = [
    Case(variant, method, architecture)
    for variants in VARIANTS.values()
    for variant, method in variants.items()
    for architecture in ARCHITECTURES
    if (variant, architecture) not in REFUSED
]


def mark_cases(cases: Iterable[Case]) -> list[ParameterSet]:
    """Return one parameter for each case; presets of a method that other cases cover are slow."""
    return [
        pytest.param(case, id=str(case), marks=pytest.mark.slow if case.method.kind in PRESETS else ())
        for case in cases
    ]


every_case = pytest.mark.parametrize("case", mark_cases(CASES))
"""Mark that runs a test for every method, variant and architecture."""


def _list_one_case_per_variant() -> list[Case]:
    """Return a case of each variant, over the architectures in turn."""
    by_variant: dict[str, list[Case]] = {}
    for case in CASES:
        by_variant.setdefault(case.variant, []).append(case)
    return [cases[index % len(cases)] for index, cases in enumerate(by_variant.values())]


ONE_CASE_PER_VARIANT = _list_one_case_per_variant()
every_variant = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in ONE_CASE_PER_VARIANT else pytest.mark.slow) for case in CASES],
    ids=str,
)
"""Mark that runs a test for every method and variant on one architecture; the other architectures are slow."""


@dataclass
class Bench:
    """A method applied to a small base model."""

    case: Case
    base: PreTrainedModel
    model: nn.Module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Return a new optimizer of the trained parameters, without weight decay: only gradients change them."""
        return torch.optim.AdamW(
            trainable_parameters(self.model).values(), lr=RATES[self.case.method.kind], weight_decay=0.0
        )

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Return all parameters and buffers by name; a tied one once."""
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    @torch.no_grad()
    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """Return the logits at the real positions, as in evaluation."""
        from tests.helpers.batches import logits

        self.model.eval()
        return logits(self.model, batch)


MakeBench = Callable[[Case], Bench]


def bench_of(case: Case, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Bench:
    """Apply the method of ``case`` to ``base``, in training mode."""
    torch.manual_seed(3)
    model = case.method.apply(base, tokenizer)
    case.method.set_training(model)
    return Bench(case, base, model)
