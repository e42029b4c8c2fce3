"""A summary depends on its article alone: not on its batch, its padding or the cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from datasets import Dataset
from torch import nn

from peftbench.data.encode import Encoder
from peftbench.methods.base import Method
from peftbench.training.loop import train_step
from tests.conformance.battery import Bench, Case, bench_of, every_case
from tests.helpers.batches import logits, micro_batch, one_batch
from tests.helpers.methods import every_architecture, every_method
from tests.helpers.training import trainer_of
from tests.unit.evaluation.conftest import NEW_TOKENS, MakeEvaluation

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@pytest.fixture
def moved_bench(
    fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> Callable[[Case], Bench]:
    """A case's method on its base, a few steps away from where it started, so that what was trained is in the text."""

    def made(case: Case) -> Bench:
        bench = bench_of(case, fresh_base(case.architecture), tokenizer)
        trainer = trainer_of(accelerator, bench.model, bench.optimizer)
        for _ in range(3):
            train_step(
                accelerator, trainer, one_batch(micro_batch(virtual=case.method.virtual_tokens)), max_grad_norm=1.0
            )
        return bench

    return made


def _by_hand(model: nn.Module, encoder: Encoder, article: str) -> str:
    """Greedy generation the slow way: the whole sequence again for every token, as a training step would see it."""
    model.eval()
    ids = encoder.encode_prompt(article)
    start = len(ids)
    while len(ids) < start + NEW_TOKENS and ids[-1] != encoder.eos_token_id:
        length = len(ids)
        batch = micro_batch([(length, length)])
        batch.input_ids[0] = torch.tensor(ids)
        with torch.no_grad():
            ids.append(int(logits(model, batch)[0, -1].argmax()))
    return encoder.decode(ids[start:])


@every_case
def test_batch_and_padding_change_no_text(
    case: Case,
    moved_bench: Callable[[Case], Bench],
    evaluation: MakeEvaluation,
    encoder: Encoder,
    encoded: Dataset,
) -> None:
    """Generated together, padded at the left, summaries are those generated one by one, and those found by hand.

    With soft tokens this is a trap: padding must not come between them and the prompt.
    """
    model = moved_bench(case).model
    together = evaluation(case.method, model, batch_size=16).generate_summaries()
    assert together == evaluation(case.method, model, batch_size=1).generate_summaries()
    assert together == [_by_hand(model, encoder, article) for article in encoded["article"]]
    assert len(set(together)) > 1  # texts that differ, so that their order is known too


@every_method
@every_architecture
def test_beams_do_not_depend_on_the_batch(
    architecture: str, method: Method, moved_bench: Callable[[Case], Bench], evaluation: MakeEvaluation
) -> None:
    """A search by beams finds the same summaries together and one by one, and others than a greedy one."""
    model = moved_bench(Case("num_beams", method, architecture)).model
    together = evaluation(method, model, batch_size=16, num_beams=3).generate_summaries()
    assert together == evaluation(method, model, batch_size=1, num_beams=3).generate_summaries()
    assert together != evaluation(method, model, batch_size=16).generate_summaries()


@every_method
def test_model_is_as_before_after_generation(
    method: Method, moved_bench: Callable[[Case], Bench], evaluation: MakeEvaluation
) -> None:
    """Generation leaves no cache and no other trace: the model predicts the same as before, to the last bit."""
    bench = moved_bench(Case("trace", method, "gpt2_tied"))
    before = bench.logits(micro_batch())
    evaluation(method, bench.model).generate_summaries()
    assert torch.equal(bench.logits(micro_batch()), before)
