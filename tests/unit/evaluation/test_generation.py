"""Generation: a summary depends on its article only, not on batch, padding or key-value cache."""

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
from tests.conformance.battery import CASES, Bench, Case, bench_of
from tests.helpers.batches import logits, micro_batch, one_batch
from tests.helpers.evaluators import NEW_TOKENS, BuildEvaluator
from tests.helpers.methods import ONE_OF_EACH, one_method_fast
from tests.helpers.models import ARCHITECTURES
from tests.helpers.sweeps import mark_slow
from tests.helpers.training import assemble_training

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftbench.data.readers.rows import Example


GENERATION_CASES = [
    pytest.param(*point.values, id=str(point.values[0]), marks=point.marks)
    for point in mark_slow(
        [(case,) for case in CASES],
        keep=lambda point: str(point[0]) in {"prompt-gpt2_tied", "lora-llama_tied"},
        seed=3,
    )
]
BEAM_CASES = mark_slow(
    [(method, architecture) for method in ONE_OF_EACH.values() for architecture in ARCHITECTURES],
    keep=lambda point: point[1] == "gpt2_tied" and point[0].kind == "prompt_tuning",
    seed=4,
)


@pytest.fixture
def trained_bench(
    fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> Callable[[Case], Bench]:
    """Return a function that builds a case's bench and trains it for three steps, which changes the generated text."""

    def build(case: Case) -> Bench:
        bench = bench_of(case, fresh_base(case.architecture), tokenizer)
        trainer = assemble_training(accelerator, bench.model, bench.optimizer)
        for _ in range(3):
            train_step(
                accelerator, trainer, one_batch(micro_batch(virtual=case.method.virtual_tokens)), max_grad_norm=1.0
            )
        return bench

    return build


def _generate_without_cache(model: nn.Module, encoder: Encoder, example: Example) -> str:
    """Generate greedily with a forward pass over the whole sequence for every token."""
    model.eval()
    ids = encoder.encode_prompt(example)
    start = len(ids)
    while len(ids) < start + NEW_TOKENS and ids[-1] != encoder.eos_token_id:
        length = len(ids)
        batch = micro_batch([(length, length)])
        batch.input_ids[0] = torch.tensor(ids)
        with torch.no_grad():
            ids.append(int(logits(model, batch)[0, -1].argmax()))
    return encoder.decode(ids[start:])


@pytest.mark.parametrize("case", GENERATION_CASES)
def test_batch_padding_and_cache_do_not_change_the_summaries(
    case: Case,
    trained_bench: Callable[[Case], Bench],
    build_evaluator: BuildEvaluator,
    encoder: Encoder,
    encoded: Dataset,
) -> None:
    """Left-padded batches give the same summaries as single prompts, and as generation without a cache.

    With virtual tokens, padding must not be between them and the prompt.
    """
    model = trained_bench(case).model
    batched = build_evaluator(case.method, model, batch_size=16).generate()
    assert batched == build_evaluator(case.method, model, batch_size=1).generate()
    assert batched == [_generate_without_cache(model, encoder, row) for row in encoded]
    assert len(set(batched)) > 1  # the texts differ, so their order is checked too


@pytest.mark.parametrize(("method", "architecture"), BEAM_CASES)
def test_beam_search_is_independent_of_the_batch(
    architecture: str, method: Method, trained_bench: Callable[[Case], Bench], build_evaluator: BuildEvaluator
) -> None:
    """Batched and single beam search give the same summaries, which differ from greedy ones."""
    model = trained_bench(Case("num_beams", method, architecture)).model
    batched = build_evaluator(method, model, batch_size=16, num_beams=3).generate()
    assert batched == build_evaluator(method, model, batch_size=1, num_beams=3).generate()
    assert batched != build_evaluator(method, model, batch_size=16).generate()


@one_method_fast("lora")
def test_generation_does_not_change_the_model(
    method: Method, trained_bench: Callable[[Case], Bench], build_evaluator: BuildEvaluator
) -> None:
    """Logits are bit-identical before and after generation."""
    bench = trained_bench(Case("trace", method, "gpt2_tied"))
    before = bench.logits(micro_batch())
    build_evaluator(method, bench.model).generate()
    assert torch.equal(bench.logits(micro_batch()), before)
