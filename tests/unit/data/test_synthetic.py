"""Synthetic examples: random text whose lengths follow a given distribution."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import pytest
from pydantic import ValidationError

from peftbench.data.synthetic import Synthetic
from peftbench.methods.full import Full
from tests.helpers.summaries import load_summaries
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def test_lengths_follow_their_quantiles() -> None:
    """The quantiles of many sampled lengths match the given ones within sampling error."""
    source = Synthetic(examples=20_000)
    articles, summaries = zip(*source.sample_lengths("train"), strict=True)
    for lengths, quantiles in ((articles, source.prompt_tokens), (summaries, source.completion_tokens)):
        sampled = numpy.quantile(lengths, numpy.linspace(0, 1, len(quantiles)))
        assert sampled[1:-1] == pytest.approx(quantiles[1:-1], rel=0.03)
        assert (min(lengths), max(lengths)) == pytest.approx((quantiles[0], quantiles[-1]), rel=0.1)


def test_texts_have_the_sampled_lengths(tokenizer: PreTrainedTokenizerBase) -> None:
    """With the shipped tokenizer each word is one token, so texts have exactly the sampled number of tokens."""
    source = Synthetic(examples=20, prompt_tokens=(5, 90), completion_tokens=(1, 9))
    rows, lengths = load_summaries(source), source.sample_lengths("train")
    assert len(rows) == 20
    for row, (article, summary) in zip(rows, lengths, strict=True):
        for text, expected in ((row["article"], article), (row["summary"], summary)):
            assert len(tokenizer(" " + text)["input_ids"]) == expected


def test_default_lengths_match_cnn_dailymail(shared_data: Path) -> None:
    """The default quantiles are the deciles of CNN/DailyMail pairs with GPT-2's tokenizer."""
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "gpt2")
    lines = (shared_data / "cnn_dailymail" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    source = Synthetic()
    for column, expected in (("article", source.prompt_tokens), ("highlights", source.completion_tokens)):
        lengths = [len(ids) for ids in tokenizer([row[column] for row in rows])["input_ids"]]
        assert tuple(numpy.quantile(lengths, numpy.linspace(0, 1, 11)).round().astype(int)) == expected


def test_examples_depend_on_split_and_seed_only() -> None:
    """Equal sources give equal examples; another split or seed gives others."""
    first = Synthetic(examples=8)
    assert load_summaries(first)["article"] == load_summaries(Synthetic(examples=8))["article"]
    others = [
        first.sample_lengths("validation"),
        first.sample_lengths("test"),
        Synthetic(examples=8, seed=1).sample_lengths("train"),
    ]
    assert all(lengths != first.sample_lengths("train") for lengths in others)
    assert first.fingerprint() == Synthetic(examples=8).fingerprint()
    assert len({source.fingerprint() for source in (first, Synthetic(examples=9), Synthetic(examples=8, seed=1))}) == 3


def test_descending_quantiles_are_refused() -> None:
    """Quantiles must be in ascending order."""
    with pytest.raises(ValidationError, match="must be in ascending order"):
        Synthetic(prompt_tokens=(9, 8))


def test_run_trains_on_synthetic_examples(workshop: Workshop) -> None:
    """A whole run needs no data files."""
    source = Synthetic(examples=12, prompt_tokens=(3, 30), completion_tokens=(1, 5))
    record = workshop.run(workshop.recipe(Full(), data={"source": source}))
    assert record.outcome.kind == "ok"
    assert record.num_examples == {"test": 12, "train": 12}
    assert record.data_fingerprint == source.fingerprint()
