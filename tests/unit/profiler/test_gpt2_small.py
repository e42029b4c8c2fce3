"""GPT-2 small on real articles: the ratios of hardware FLOPs between methods match the formulas."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from peftbench.data.sources import Files
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.recipe.schema import Profile
from peftbench.tasks.summarization import Summarization
from tests.helpers.workshop import Workshop

RANK, VIRTUAL_TOKENS, REAL_TOKENS = 8, 20, 108
LAYERS, WIDTH, VOCABULARY = 12, 768, 50257
METHODS: tuple[Method, ...] = (
    Full(),
    LastLayer(),
    Lora(r=RANK, target_modules=None),
    PromptTuning(num_virtual_tokens=VIRTUAL_TOKENS),
)


def compute_by_formula(kind: str, length: int, labels: Fraction) -> Fraction:
    """Return forward and backward FLOPs of one sequence, with fused attention's fifth backward product."""
    blocks = 24 * LAYERS * WIDTH**2 * length
    attention = Fraction(7, 2) * 4 * length * (length + 1) / 2 * WIDTH * LAYERS
    head = 2 * labels * WIDTH * VOCABULARY
    low = 2 * length * LAYERS * 4 * WIDTH * RANK
    first = 2 * length * (3 * WIDTH**2 + WIDTH * RANK)  # the first block's input needs no gradient
    return {
        "full": 3 * blocks + attention + 3 * head,
        "last_layer": blocks + attention * Fraction(2, 7) + 2 * head,
        "prompt_tuning": 2 * blocks + attention + 2 * head,
        "lora": 2 * blocks + attention + 2 * head + 3 * low - first,
    }[kind]


@pytest.mark.slow
def test_flop_ratios_match_formulas(shared_data: Path, workshop: Workshop) -> None:
    """In two steps on CNN/DailyMail, FLOPs equal the dispatched count, and their ratios equal the formulas exactly."""
    news = shared_data / "cnn_dailymail"
    source = Files(train=str(news / "train.jsonl"), test=str(news / "test.jsonl"), id="id")
    executed, labels = {}, set()
    for method in METHODS:
        record = workshop.run(
            workshop.recipe(
                method,
                model={"path": str(shared_data / "gpt2"), "init": "random", "dropout": 0.0},
                data={
                    "source": source,
                    "train": 8,
                    "test": 1,
                    "max_length": REAL_TOKENS,
                    "padding": "max_length",
                    "overlong": "drop",
                },
                train={"steps": 2, "global_batch_size": 2, "micro_batch_size": 1},
                profile=Profile(untimed_steps=1),
                task=Summarization(summary="highlights", separator=" TL;DR:"),
            )
        )
        step = record.flops.counted_step
        assert step is not None
        assert step.counted_flops == step.closed_form_flops
        assert (record.flops.hardware_flops or 0) > step.counted_flops  # two steps with different numbers of labels
        assert record.flops.hardware_flops is not None
        assert record.tokens is not None
        executed[method.kind] = record.flops.hardware_flops
        labels.add(Fraction(record.tokens.labeled, 4))
    (labeled,) = labels  # the same examples for every method; FLOPs are linear in them
    lengths = {method.kind: REAL_TOKENS + method.virtual_tokens for method in METHODS}
    for kind, flops in executed.items():
        expected = compute_by_formula(kind, lengths[kind], labeled) / compute_by_formula("full", REAL_TOKENS, labeled)
        assert Fraction(flops, executed["full"]) == expected
        assert flops == 4 * compute_by_formula(kind, lengths[kind], labeled)
    assert len(executed) == 4
