"""Methods refuse unsupported architectures and invalid targets, with a message that names an alternative."""

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

_METHOD_BY_VARIANT = {variant: method for variants in VARIANTS.values() for variant, method in variants.items()}
_REFUSED = sorted(REFUSED)


def test_refused_pairs_name_known_variants() -> None:
    """Every refused pair names a variant and an architecture of the battery."""
    assert _REFUSED
    assert {variant for variant, _ in _REFUSED} <= set(_METHOD_BY_VARIANT)
    assert {architecture for _, architecture in _REFUSED} <= set(ARCHITECTURES)


@pytest.mark.parametrize(("variant", "architecture"), _REFUSED)
def test_unsupported_architecture_is_refused(
    variant: str,
    architecture: str,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The message names the key to set instead."""
    method: Method = _METHOD_BY_VARIANT[variant]
    with pytest.raises(UnsupportedModelError, match=r"use .*method\.(head=untied|kind=layer_norm)"):
        method.apply(fresh_base(architecture), tokenizer)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("c_attn", "q_porj"), "'q_porj' matches no module"),  # a valid target does not hide an invalid one
        (("c_attn", "ln_1"), "'ln_1' matches transformer.h.0.ln_1, which has no matrix to adapt"),
        (
            "c_attn",
            r"'c_attn' matches no module of the model .*; write \[c_attn\] for a suffix of names",
        ),
        (r".*\.attn", "matches transformer.h.0.attn, which has no matrix"),
    ],
)
def test_each_target_must_match_a_matrix(
    targets: tuple[str, ...] | str,
    message: str,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Every entry must match a module with a matrix, which LoRA can adapt."""
    with pytest.raises(TargetModulesError, match=message):
        Lora(target_modules=targets).apply(fresh_base("gpt2_tied"), tokenizer)


@pytest.mark.parametrize("targets", ["c_attn(", "", ()])
def test_invalid_target_modules_are_refused(targets: tuple[str, ...] | str) -> None:
    """The error is raised before a model is loaded."""
    with pytest.raises(ValueError, match=r"regular expression|at least one module"):
        Lora(target_modules=targets)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("targets", [("c_atn", "q_prj"), r".*\.atention\..*", "all-linears"])
def test_target_modules_without_a_match_are_refused(
    targets: tuple[str, ...] | str,
    architecture: str,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The message lists names of the model, which is unchanged."""
    base = fresh_base(architecture)
    method = Lora(target_modules=targets)
    valid_name = "c_attn" if architecture == "gpt2_tied" else "q_proj"
    with pytest.raises(TargetModulesError, match=f"matches no module.*{valid_name}"):
        method.apply(base, tokenizer)
    with pytest.raises(TargetModulesError):
        method.trainable_parameters(base)
    assert all(parameter.requires_grad for parameter in base.parameters())  # the model is unchanged
