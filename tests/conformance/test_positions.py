"""Every method can use all positions of a model, virtual tokens included, and no more."""

from __future__ import annotations

import pytest
import torch

from peftbench.data.encode import SequenceLayout
from peftbench.errors import OutOfRangeError
from tests.conformance.battery import CASES, Case, MakeBench, every_case, mark_cases
from tests.helpers.batches import logits, micro_batch
from tests.helpers.models import POSITIONS
from tests.helpers.training import summed_loss

NEW_TOKENS = 6


def _layout(case: Case, max_tokens: int | None) -> SequenceLayout:
    return SequenceLayout.for_model(
        max_length=max_tokens,
        max_new_tokens=NEW_TOKENS,
        max_positions=POSITIONS,
        virtual_tokens=case.method.virtual_tokens,
    )


def test_cases_have_methods_with_and_without_virtual_tokens() -> None:
    """The tests below cover both kinds."""
    assert {case.method.virtual_tokens > 0 for case in CASES} == {True, False}


@every_case
def test_layout_leaves_room_for_virtual_tokens(case: Case) -> None:
    """The default length is the number of positions without virtual tokens; one more is refused with both numbers."""
    room = POSITIONS - case.method.virtual_tokens
    assert _layout(case, None).max_length == room
    assert _layout(case, room).max_length == room
    with pytest.raises(OutOfRangeError, match=rf"max_length={room + 1} .*{POSITIONS} positions.*max_length={room} "):
        _layout(case, room + 1)


@every_case
def test_longest_sequence_has_a_finite_loss(case: Case, make_bench: MakeBench) -> None:
    """The sequence fills all positions of the model; logits are only those of the real positions."""
    room = _layout(case, None).max_length
    bench = make_bench(case)
    batch = micro_batch([(room, 4), (9, 3)], virtual=case.method.virtual_tokens)
    assert torch.isfinite(summed_loss(bench.model, batch))
    assert logits(bench.model, batch).shape == (2, room, 4096)


@every_case
def test_longest_prompt_can_be_continued(case: Case, make_bench: MakeBench) -> None:
    """Prompt and new tokens fill all positions of the model."""
    bench = make_bench(case)
    bench.model.eval()
    width = _layout(case, None).max_length - NEW_TOKENS
    ids = torch.randint(1, 4096, (2, width), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : width // 2] = 0
    generated = case.method.generate(
        bench.model,
        ids,
        mask,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        eos_token_id=0,
        pad_token_id=0,
    )
    assert generated.shape == (2, NEW_TOKENS)


@pytest.mark.parametrize("case", mark_cases(case for case in CASES if case.architecture == "gpt2_tied"))
def test_one_token_more_raises_an_index_error(case: Case, make_bench: MakeBench) -> None:
    """Learned position embeddings have no row for it, so the tests above reach the last position."""
    with pytest.raises(IndexError):
        summed_loss(
            make_bench(case).model,
            micro_batch([(_layout(case, None).max_length + 1, 4)], virtual=case.method.virtual_tokens),
        )
