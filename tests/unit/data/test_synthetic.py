"""Examples without meaning: their lengths are those of the distribution they are drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import pytest
from pydantic import ValidationError

from peftbench.data.synthetic import Synthetic
from peftbench.methods.full import Full
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def test_lengths_follow_their_quantiles() -> None:
    """Of many examples, the quantiles are those given, to what chance makes of them."""
    source = Synthetic(examples=20_000)
    articles, summaries = zip(*source.sample_lengths("train"), strict=True)
    for drawn, given in ((articles, source.article_tokens), (summaries, source.summary_tokens)):
        found = numpy.quantile(drawn, numpy.linspace(0, 1, len(given)))
        assert found[1:-1] == pytest.approx(given[1:-1], rel=0.03)
        assert (min(drawn), max(drawn)) == pytest.approx((given[0], given[-1]), rel=0.1)


def test_texts_have_the_lengths_drawn(tokenizer: PreTrainedTokenizerBase) -> None:
    """Under the shipped tokenizer every word is one token, so a text has exactly as many as were drawn."""
    source = Synthetic(examples=20, article_tokens=(5, 90), summary_tokens=(1, 9))
    rows, lengths = source.load("train"), source.sample_lengths("train")
    assert len(rows) == 20
    for row, (article, summary) in zip(rows, lengths, strict=True):
        for text, expected in ((row["article"], article), (row["summary"], summary)):
            assert len(tokenizer(" " + text)["input_ids"]) == expected


def test_real_lengths_are_the_default(shared_data: Path) -> None:
    """The default lengths are the deciles of real CNN/DailyMail pairs under GPT-2's own tokenizer."""
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "gpt2")
    lines = (shared_data / "cnn_dailymail" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    source = Synthetic()
    for column, expected in (("article", source.article_tokens), ("highlights", source.summary_tokens)):
        lengths = [len(ids) for ids in tokenizer([row[column] for row in rows])["input_ids"]]
        assert tuple(numpy.quantile(lengths, numpy.linspace(0, 1, 11)).round().astype(int)) == expected


def test_splits_and_seeds_differ_and_repeat() -> None:
    """The same source gives the same examples every time; splits and seeds have others."""
    first = Synthetic(examples=8)
    assert first.load("train")["article"] == Synthetic(examples=8).load("train")["article"]
    others = [
        first.sample_lengths("validation"),
        first.sample_lengths("test"),
        Synthetic(examples=8, seed=1).sample_lengths("train"),
    ]
    assert all(lengths != first.sample_lengths("train") for lengths in others)
    assert first.fingerprint() == Synthetic(examples=8).fingerprint()
    assert len({s.fingerprint() for s in (first, Synthetic(examples=9), Synthetic(examples=8, seed=1))}) == 3


def test_lengths_that_fall_are_refused() -> None:
    """Quantiles rise."""
    with pytest.raises(ValidationError, match="must be in ascending order"):
        Synthetic(article_tokens=(9, 8))


def test_a_run_over_synthetic_examples(workshop: Workshop) -> None:
    """A whole run needs no data at all."""
    source = Synthetic(examples=12, article_tokens=(3, 30), summary_tokens=(1, 5))
    record = workshop.run(workshop.recipe(Full(), data={"source": source}))
    assert record.outcome.kind == "ok"
    assert record.num_examples == {"test": 12, "train": 12}
    assert record.data_fingerprint == source.fingerprint()
