"""Mask-free attention on many architectures: used only if it computes the same logits as separate documents.

Models are tiny, with random weights. The reference is transformers' own attention, one document per forward pass.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn.functional import cross_entropy

from peftbench.data.collate import Collator, PaddingFreeCollator
from peftbench.modeling.loss import CausalLMLoss, build_loss
from tests.helpers.architectures import TINY_CONFIGS, VOCABULARY, build_tiny_model
from tests.helpers.batches import rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftbench.data.collate import MicroBatch

DOCUMENTS = ((14, 3), (20, 5), (9, 1), (1, 1), (20, 19))
"""Tokens and prompt tokens of each document; one document has no label, and one has a single label."""
TOLERANCE = 1e-4
"""Maximum relative difference of losses and logits. Largest measured: 4e-6; smallest of a refused model: 0.05."""

MASK_FREE = ("cohere", "gpt2", "gpt_neox", "granite", "llama", "olmo2", "opt", "phi", "qwen2", "qwen3")
"""Cases that must run without masks."""
LENGTH_DEPENDENT = ("llama, dynamic RoPE", "phi3, LongRoPE")
"""Cases whose position embedding depends on the length of the whole row, so that padding changes their logits too."""
MIXING = (
    *LENGTH_DEPENDENT,
    "bart",
    "blenderbot",
    "blenderbot-small",
    "camembert",
    "data2vec-text",
    "falcon_h1",
    "lfm2, convolutions",
    "llama4_text, chunks",
    "marian",
    "mbart",
    "pegasus",
    "plbart",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
)
"""Cases that mix the documents of a row without a mask: they compute their own positions, or keep state across the row,
or attend in chunks of the row."""


def draw_documents() -> list[list[int]]:
    """Return random tokens of each document."""
    return [[1 + token % (VOCABULARY - 1) for token in row["input_ids"]] for row in rows(DOCUMENTS)]


@functools.cache
def build_base(case: str) -> PreTrainedModel:
    """Return an unmodified transformers model, with weights large enough that each of them affects the logits."""
    base = build_tiny_model(case)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return base


@functools.cache
def compute_reference_logits(case: str) -> torch.Tensor:
    """Return the logits that predict the labels, one document per forward pass: (labels, vocabulary)."""
    logits = []
    for tokens, (_, prompt) in zip(draw_documents(), DOCUMENTS, strict=True):
        base = copy.deepcopy(build_base(case))  # some models store the length of the longest row so far
        with torch.no_grad():
            logits.append(base(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, prompt - 1 : -1])
    return torch.cat(logits)


@functools.cache
def build_cached_loss(case: str) -> tuple[CausalLMLoss, tuple[str, ...]]:
    """Return the loss of a copy of the base, and its notes."""
    return build_loss(copy.deepcopy(build_base(case)))


def collate_documents(collator: Collator) -> MicroBatch:
    """Return the documents in one micro-batch."""
    return collator.collate(draw_documents(), [[prompt, length] for length, prompt in DOCUMENTS])


def assert_matches_reference(case: str, collator: Collator) -> None:
    """Compare the logits at every label, the summed loss and the loss of each token with the reference."""
    (loss, _), expected, batch = build_cached_loss(case), compute_reference_logits(case), collate_documents(collator)
    with torch.no_grad(), loss.attention_context():
        logits, summed = loss.logits(loss.base, batch), loss(loss.base, batch)
        by_token = loss.per_token(loss.base, batch)
    difference = float((logits - expected).abs().max() / expected.abs().max())
    assert difference <= TOLERANCE, f"logits of {case} differ by {difference:.1e} with {type(collator).__name__}"
    expected_losses = cross_entropy(expected, batch.targets, reduction="none")
    assert summed.item() == pytest.approx(expected_losses.sum().item(), rel=TOLERANCE)
    assert float((by_token - expected_losses).abs().max() / expected_losses.max()) <= TOLERANCE


def test_sweep_has_cases_with_and_without_masks() -> None:
    """At least 80 architectures, 30 cases with masks and 30 without."""
    masked = {case for case in TINY_CONFIGS if build_cached_loss(case)[0].uses_masks}
    assert len({case.split(",")[0] for case in TINY_CONFIGS}) >= 80
    assert len(masked) >= 30
    assert len(TINY_CONFIGS) - len(masked) >= 30


@pytest.mark.parametrize("case", TINY_CONFIGS)
def test_batched_documents_match_separate_forward_passes(case: str) -> None:
    """Packed into one row without masks, and in padded rows; a case that needs masks states the reason in its notes."""
    loss, notes = build_cached_loss(case)
    assert loss.uses_masks == (loss.mask_reason is not None)
    if loss.uses_masks:
        assert loss.mask_reason
        assert any(loss.mask_reason in note for note in notes)
    else:
        assert_matches_reference(case, PaddingFreeCollator(0))
    if case not in LENGTH_DEPENDENT:
        assert_matches_reference(case, Collator(0))


@pytest.mark.parametrize("case", MASK_FREE)
def test_mask_free_architectures_use_no_masks(case: str) -> None:
    """This fails if the check refuses every architecture."""
    assert build_cached_loss(case)[0].mask_reason is None


@pytest.mark.parametrize("case", MIXING)
def test_mixing_architectures_use_masks(case: str) -> None:
    """The reason is recorded, and the attention implementation of the model is unchanged."""
    loss, _ = build_cached_loss(case)
    assert loss.mask_reason
    assert loss.uses_masks
    with loss.attention_context():
        assert loss.base.config._attn_implementation == build_base(case).config._attn_implementation


@pytest.mark.parametrize("case", MIXING)
def test_mixing_architectures_fail_without_masks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the check disabled, the comparison with the reference fails."""
    monkeypatch.setattr("peftbench.modeling.loss.find_mask_free_blocker", lambda _: None)
    build_cached_loss.cache_clear()
    try:
        assert not build_cached_loss(case)[0].uses_masks
        with pytest.raises((AssertionError, TypeError)):
            assert_matches_reference(case, PaddingFreeCollator(0))
    finally:
        build_cached_loss.cache_clear()
