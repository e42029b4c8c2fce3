"""What a method cannot do on an architecture it refuses, and says what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from peftbench.errors import TargetModulesError, UnsupportedModelError
from peftbench.methods.base import Method
from peftbench.methods.lora import Lora
from tests.conformance.battery import REFUSED, VARIANTS
from tests.helpers.models import ARCHITECTURES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAMED = {variant: method for variants in VARIANTS.values() for variant, method in variants.items()}
_REFUSED = sorted(REFUSED)


def test_refusals_are_of_known_variants() -> None:
    """Every refused pair names a variant and an architecture of the battery."""
    assert _REFUSED
    assert {variant for variant, _ in _REFUSED} <= set(_NAMED)
    assert {architecture for _, architecture in _REFUSED} <= set(ARCHITECTURES)


@pytest.mark.parametrize(("variant", "architecture"), _REFUSED)
def test_refused_pairs(
    variant: str,
    architecture: str,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The method says that it cannot, in a sentence that names the way out."""
    method: Method = _NAMED[variant]
    with pytest.raises(UnsupportedModelError, match=r"use .*method\.head=untied"):
        method.apply(fresh_base(architecture), tokenizer)


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (("c_attn", "q_porj"), "'q_porj' matches no matrix"),  # one that is there does not hide one that is not
        (("c_attn", "ln_1"), "'ln_1' matches transformer.h.0.ln_1, which has no matrix to adapt"),
        ("c_attn", r"'c_attn' matches no matrix of gpt2; write \[c_attn\] for a suffix of names"),
        (r".*\.attn", "matches transformer.h.0.attn, which has no matrix"),
    ],
)
def test_each_target_must_be_a_matrix(
    targets: tuple[str, ...] | str,
    sentence: str,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Every name that a person wrote must be found, and be something that LoRA can adapt."""
    with pytest.raises(TargetModulesError, match=sentence):
        Lora(target_modules=targets).apply(fresh_base("gpt2_tied"), tokenizer)


@pytest.mark.parametrize("targets", ["c_attn(", "", ()])
def test_invalid_target_modules_are_refused(targets: tuple[str, ...] | str) -> None:
    """An invalid expression and an empty list are refused before anything is loaded."""
    with pytest.raises(ValueError, match=r"regular expression|at least one module"):
        Lora(target_modules=targets)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("targets", [("c_atn", "q_prj"), r".*\.atention\..*", "all-linears"])
def test_target_modules_that_match_nothing(
    targets: tuple[str, ...] | str,
    architecture: str,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """LoRA on nothing is refused before anything is trained, with the names that there are."""
    base = fresh_base(architecture)
    method = Lora(target_modules=targets)
    there = "c_attn" if architecture == "gpt2_tied" else "q_proj"
    with pytest.raises(TargetModulesError, match=f"matches no matrix.*{there}"):
        method.apply(base, tokenizer)
    with pytest.raises(TargetModulesError):
        method.trainable_parameters(base)
    assert all(parameter.requires_grad for parameter in base.parameters())  # nothing was touched
