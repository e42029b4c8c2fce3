"""Summarization: the ids of its sequences, which must never change, and the names of its columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from peftbench.tasks.summarization import Summarization
from tests.helpers.summaries import SEPARATOR, as_example, summary_encoder
from tests.helpers.tokenizers import spaced_bpe_tokenizer, spaced_word_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG = "The council met in the morning and voted on the bridge. " * 4
BYTE_LEVEL_GOLDEN = [
    (
        (SEPARATOR, "A short article.", "Council votes on bridge."),
        [33, 3428, 414, 84, 312, 286, 14, 199, 52, 44, 27, 36, 50, 26],
        [2351, 855, 334, 348, 341, 268, 390, 289, 1476, 652, 14, 0],
        [33, 3428, 414, 84, 312, 286, 14, 199, 52, 44, 27, 36, 50, 26],
        20,
        0,
    ),
    (
        (SEPARATOR, LONG, "  Yes.\n"),
        [
            609,
            416,
            855,
            334,
            295,
            294,
            291,
            269,
            295,
            263,
            1004,
            337,
            348,
            341,
            280,
            390,
            269,
            289,
            1476,
            652,
            14,
            199,
            52,
            44,
            27,
            36,
            50,
            26,
        ],
        [1873, 268, 14, 0],
        [
            609,
            416,
            855,
            334,
            295,
            294,
            291,
            269,
            295,
            263,
            1004,
            337,
            348,
            341,
            280,
            390,
            269,
            199,
            52,
            44,
            27,
            36,
            50,
            26,
        ],
        12,
        64,
    ),
    (
        (" =>", "naïve \u2013 \u201cquotes\u201d 日本 🙂  ", "été <|endoftext|>"),
        [2454, 128, 108, 521, 3310, 242, 3310, 251, 357, 341, 268, 159, 223, 252, 221, 352, 30],
        [221, 128, 103, 84, 128, 103, 867, 92, 483, 79, 834, 532, 92, 30, 0],
        [
            2454,
            128,
            108,
            521,
            3310,
            242,
            3310,
            251,
            357,
            341,
            268,
            159,
            223,
            252,
            221,
            163,
            246,
            99,
            163,
            251,
            106,
            221,
            352,
            30,
        ],
        18,
        12,
    ),
    (
        ("\n\nSummary:\n", "Twice <|endoftext|> here.", "First line.\nSecond line."),
        [52, 87, 755, 867, 92, 483, 79, 834, 532, 92, 30, 2352, 14, 199, 199, 51, 333, 2827, 26, 199],
        [461, 824, 1588, 14, 199, 3109, 1255, 1588, 14, 0],
        [52, 87, 755, 867, 92, 483, 79, 834, 532, 92, 30, 2352, 14, 199, 199, 51, 333, 2827, 26, 199],
        18,
        0,
    ),
]
SPACED_WORDS_GOLDEN = [
    ((":", "a b", "b a"), [3, 4, 8], [4, 3, 1], [3, 4, 8], 5, 0),
    ((":", " a b", " b  a "), [2, 3, 4, 8], [4, 2, 3, 1], [2, 3, 4, 8], 6, 0),
    ((":", "a b " * 30, "b"), [*[3, 4] * 14, 3, 8], [4, 1], [*[3, 4] * 11, 3, 8], 4, 32),
]
SPACED_BPE_GOLDEN = [
    (
        (SEPARATOR, "ab a. b", "ab ab."),
        [1, 273, 270, 268, 271, 259, 13, 274, 267, 264, 265, 266],
        [273, 273, 268, 2],
        [1, 273, 270, 268, 271, 259, 13, 274, 267, 264, 265, 266],
        13,
        0,
    ),
    (
        (" =>", "a b </s> " * 9, "  b</s>\n"),
        [
            1,
            270,
            271,
            259,
            63,
            50,
            118,
            65,
            270,
            271,
            259,
            63,
            50,
            118,
            65,
            270,
            271,
            259,
            63,
            50,
            118,
            65,
            259,
            259,
            269,
            65,
        ],
        [271, 63, 50, 118, 65, 2],
        [1, 270, 271, 259, 63, 50, 118, 65, 270, 271, 259, 63, 50, 118, 65, 270, 271, 259, 63, 50, 259, 259, 269, 65],
        12,
        43,
    ),
    (
        (SEPARATOR, "é a\nb", "ba\nb é"),
        [1, 259, 198, 172, 270, 13, 261, 259, 13, 274, 267, 264, 265, 266],
        [271, 260, 13, 261, 259, 198, 172, 2],
        [1, 259, 198, 172, 270, 13, 261, 259, 13, 274, 267, 264, 265, 266],
        17,
        0,
    ),
]
Golden = tuple[tuple[str, str, str], list[int], list[int], list[int], int, int]
"""Separator, article and summary; the ids before the labels, the labels, the prompt of a generation, and the numbers of
tokens that are needed and cut. Version 0.2.0 encoded them so, in 32 tokens with 8 for a generation."""


def check_golden(tokenizer: PreTrainedTokenizerBase, golden: Golden) -> None:
    """Encode an example and compare everything with the earlier version's ids."""
    (separator, article, summary), before, labels, prompt, needed, cut = golden
    encoder, example = summary_encoder(tokenizer, 32, 8, separator), as_example(article, summary)
    row = encoder.encode_example(example)
    assert row["input_ids"] == [*before, *labels]
    assert row["label_spans"] == [len(before), len(before) + len(labels)]
    assert encoder.encode_prompt(example) == prompt
    assert (row["needed"], row["cut_tokens"], row["cut_labels"], row["control_tokens"]) == (needed, cut, 0, 0)


@pytest.mark.parametrize("golden", BYTE_LEVEL_GOLDEN)
def test_byte_level_ids_are_those_of_the_earlier_version(golden: Golden, tokenizer: PreTrainedTokenizerBase) -> None:
    """Results of GPT-2's tokenizers stay comparable."""
    check_golden(tokenizer, golden)


@pytest.mark.parametrize(
    ("make_tokenizer", "golden"),
    [
        *((spaced_word_tokenizer, golden) for golden in SPACED_WORDS_GOLDEN),
        *((spaced_bpe_tokenizer, golden) for golden in SPACED_BPE_GOLDEN),
    ],
)
def test_sentencepiece_ids_are_those_of_the_earlier_version(
    make_tokenizer: Callable[[], PreTrainedTokenizerBase], golden: Golden
) -> None:
    """Results of Llama's tokenizers stay comparable."""
    check_golden(make_tokenizer(), golden)


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["summary", "id", "article"], ("article", "summary")),
        (["article", "highlights", "id"], ("article", "highlights")),
        (["document", "summary"], ("document", "summary")),
        (["id", "dialogue", "summary"], ("dialogue", "summary")),
        (["article", "highlights", "summary"], ("article", "summary")),
        (["article", "text"], None),
        (["summary"], None),
    ],
)
def test_columns_of_common_data_sets_are_matched(names: list[str], columns: tuple[str, str] | None) -> None:
    """Those of CNN/DailyMail, XSum and SAMSum; the first pair counts."""
    task = Summarization.match(names)
    assert (None if task is None else tuple(task.columns.values())) == columns
