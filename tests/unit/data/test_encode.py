"""Encoding of examples: only the article is truncated, and a prompt is tokenized as in training."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peftbench.data.collate import Collator
from peftbench.data.encode import Encoder, SequenceLayout, hash_tokenizer
from peftbench.data.sources import Files
from peftbench.errors import OutOfRangeError, SequenceTooShortError
from peftbench.tasks.completion import Completion
from peftbench.tasks.summarization import Summarization
from tests.helpers.batches import labels_of
from tests.helpers.summaries import SEPARATOR, as_example, load_summaries, summary_encoder
from tests.helpers.tokenizers import word_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from peftbench.data.readers.rows import Example
    from peftbench.tasks.base import Task

WriteRows = Callable[[str, Sequence[dict[str, Any]]], str]
ARTICLE = "The council met in the morning and voted on the bridge. " * 20
SUMMARY = "Council votes on bridge."
LAYOUT = SequenceLayout(128, 16)


def find_prompt(example: Mapping[str, Any]) -> int:
    """Return the number of tokens before the labels, which are all tokens after it."""
    start, end = example["label_spans"]
    assert end == len(example["input_ids"])
    return int(start)


def separator_ids(encoder: Encoder, separator: str = SEPARATOR) -> list[int]:
    """Return the tokens of the separator."""
    return list(encoder.tokenizer(separator, add_special_tokens=False)["input_ids"])


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Return an encoder with the shipped base model's tokenizer, whose pad token is its end token."""
    return summary_encoder(tokenizer)


# --- one example -----------------------------------------------------------------------------------------------------


def test_sequence_is_article_separator_summary_end(encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Each part is encoded separately, and one space is between separator and summary."""
    example = encoder.encode_example(as_example("A short article.", SUMMARY))
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("A short article.", SEPARATOR)]
    summary = tokenizer(" " + SUMMARY, add_special_tokens=False)["input_ids"]
    assert example["input_ids"] == [*parts[0], *parts[1], *summary, tokenizer.eos_token_id]
    assert find_prompt(example) == len(parts[0]) + len(parts[1])
    assert tokenizer.decode(example["input_ids"][:-1]) == f"A short article.{SEPARATOR} {SUMMARY}"


@pytest.mark.parametrize("max_tokens", [32, 40, 64, 512])
def test_only_the_article_is_truncated(max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """At every length limit, the start of the article and the whole separator, summary and end token are kept."""
    example = summary_encoder(tokenizer, max_tokens, 8).encode_example(as_example(ARTICLE, SUMMARY))
    ids, prompt = example["input_ids"], find_prompt(example)
    article = tokenizer(ARTICLE, add_special_tokens=False)["input_ids"]
    separator = tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]
    target = [*tokenizer(" " + SUMMARY, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    kept = prompt - len(separator)
    assert ids[prompt:] == target
    assert ids[:prompt] == [*article[:kept], *separator]
    assert 0 < kept <= len(article)
    assert len(ids) == min(max_tokens, len(article) + len(separator) + len(target))


def test_end_token_is_labeled_even_if_it_is_the_pad_token(encoder: Encoder) -> None:
    """If the end token and padding have the same id, the end token is in the loss and the padding after it is not."""
    short_example, long_example = (encoder.encode_example(as_example(text, SUMMARY)) for text in ("Short.", ARTICLE))
    collator = Collator(pad_token_id=encoder.eos_token_id)
    batch = collator.collate(
        [short_example["input_ids"], long_example["input_ids"]],
        [short_example["label_spans"], long_example["label_spans"]],
    )
    for row, example in enumerate((short_example, long_example)):
        length, prompt = len(example["input_ids"]), find_prompt(example)
        labels = labels_of(batch)[row].tolist()
        assert labels[:prompt] == [-100] * prompt
        assert labels[prompt:length] == example["input_ids"][prompt:]
        assert labels[length - 1] == encoder.eos_token_id
        assert labels[length:] == [-100] * (len(labels) - length)
    assert batch.input_ids[0, -1] == encoder.eos_token_id  # the short row is padded with the same id


def test_spaces_around_a_summary_are_ignored(encoder: Encoder) -> None:
    """A summary is encoded equally with and without spaces and line breaks around it."""
    spaced, plain = (encoder.encode_example(as_example("Text.", one)) for one in (f"  {SUMMARY}\n", SUMMARY))
    assert spaced == plain


@pytest.mark.parametrize("separator", ["TL;DR: ", " ", ""])
def test_separator_that_ends_in_a_space_is_refused(separator: str) -> None:
    """A trailing space would be tokenized differently in generation and in training."""
    with pytest.raises(ValueError, match="must be non-empty text that does not end in a space"):
        Summarization(separator=separator)
    assert Summarization(separator="TL;DR:\n").separator == "TL;DR:\n"


# --- prompts ---------------------------------------------------------------------------------------------------------

ARTICLES = ["A short article.", "ends in spaces   ", "", "line\nbreaks\n", "naïve – “quotes” 日本 🙂", ARTICLE[:200]]


@pytest.mark.parametrize("article", ARTICLES)
@pytest.mark.parametrize("separator", [SEPARATOR, " =>", "\n\nSummary:\n"])
def test_prompt_equals_the_prefix_in_training(article: str, separator: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """If nothing is truncated, a prompt has exactly the tokens before the first label in training."""
    encoder = summary_encoder(tokenizer, separator=separator)
    example = encoder.encode_example(as_example(article, SUMMARY))
    assert len(example["input_ids"]) < encoder.layout.max_length  # nothing was truncated
    assert encoder.encode_prompt(as_example(article)) == example["input_ids"][: find_prompt(example)]


def test_prompt_equals_the_start_of_the_tokenized_whole_text(
    encoder: Encoder, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Encoding the parts separately gives the tokens of the whole text, so generation continues normal text."""
    whole = tokenizer(f"A short article.{SEPARATOR} {SUMMARY}", add_special_tokens=False)["input_ids"]
    prompt = encoder.encode_prompt(as_example("A short article."))
    assert whole[: len(prompt)] == prompt


def test_prompt_reserves_room_for_new_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """A long article is truncated until the new tokens fit after the whole separator."""
    for new_tokens in (16, 1, 60):
        encoder = summary_encoder(tokenizer, max_new_tokens=new_tokens)
        prompt, separator = encoder.encode_prompt(as_example(ARTICLE)), separator_ids(encoder)
        assert len(prompt) + new_tokens == encoder.layout.max_length
        assert prompt[-len(separator) :] == separator


def test_decoding_stops_at_the_first_end_token(encoder: Encoder) -> None:
    """Tokens after the first end token, and spaces around the text, are not in the summary."""
    ids = encoder.encode_example(as_example("", SUMMARY))["input_ids"][len(separator_ids(encoder)) :]
    assert encoder.decode([*ids, *ids]) == SUMMARY
    assert encoder.decode(ids[:-1]) == SUMMARY
    assert encoder.decode([encoder.eos_token_id, *ids]) == ""


# --- start tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_tokenizer", "start"),
    [
        (word_tokenizer, []),
        (lambda: word_tokenizer(start="<s>"), [2]),
        (lambda: word_tokenizer(start="<s>", append_end=True), [2]),
        (lambda: word_tokenizer(append_end=True), []),
        (lambda: word_tokenizer(start="<e>"), [1]),
    ],
    ids=["none", "start", "start and end", "end", "the end token at the start"],
)
def test_start_token_is_added_once_at_the_start(
    make_tokenizer: Callable[[], PreTrainedTokenizerBase], start: list[int]
) -> None:
    """The start token is before the article only, and the end token is at the end only."""
    encoder = summary_encoder(make_tokenizer(), separator="=>")
    example, separator = encoder.encode_example(as_example("a bb", "cc")), separator_ids(encoder, "=>")
    assert example["input_ids"] == [*start, 3, 4, *separator, 5, 1]
    assert encoder.encode_prompt(as_example("a bb")) == example["input_ids"][: find_prompt(example)]
    assert example["needed"] == len(start) + 1 + len(separator) + 2
    truncated = encoder.encode_example(as_example("a bb " * 200, "cc"))["input_ids"]
    assert truncated[: len(start)] == start
    assert len(truncated) == encoder.layout.max_length


def test_llama_tokenizer_adds_one_start_token(shared_data: Path) -> None:
    """The tokenizer of a small Llama adds its start token once, before the article."""
    folder = shared_data / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("the model stories260K is not in the shared data")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = summary_encoder(tokenizer).encode_example(as_example("Once upon a time.", SUMMARY))["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1


def test_tokenizer_without_an_end_token_is_refused() -> None:
    """Without an end token a model cannot learn to stop."""
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(OutOfRangeError, match="has no end-of-sequence token"):
        summary_encoder(tokenizer)


# --- layout ----------------------------------------------------------------------------------------------------------


def layout_for_model(
    max_tokens: int | None, positions: int | None, virtual_tokens: int = 0, new_tokens: int = 8
) -> SequenceLayout:
    """Return the layout for a model with this many positions."""
    return SequenceLayout.for_model(
        max_length=max_tokens,
        max_new_tokens=new_tokens,
        max_positions=positions,
        virtual_tokens=virtual_tokens,
    )


@pytest.mark.parametrize(
    ("max_tokens", "positions", "virtual", "expected"),
    [(None, 64, 0, 64), (None, 64, 20, 44), (44, 64, 20, 44), (30, 64, 20, 30), (30, None, 20, 30)],
)
def test_max_length_excludes_virtual_tokens(
    max_tokens: int | None, positions: int | None, virtual: int, expected: int
) -> None:
    """Without a limit, a sequence can use all positions that virtual tokens leave; a given limit is kept."""
    assert layout_for_model(max_tokens, positions, virtual).max_length == expected


def test_more_real_and_virtual_tokens_than_positions_are_refused() -> None:
    """The error has the three numbers and the largest length that fits."""
    with pytest.raises(OutOfRangeError, match=r"max_length=45 and 20 virtual tokens exceed the model's 64 .*=44 or le"):
        layout_for_model(45, 64, 20)


@pytest.mark.parametrize("new_tokens", [64, 65, 600])
@pytest.mark.parametrize(("max_tokens", "virtual"), [(None, 0), (48, 0), (None, 20), (600, 0), (64, 70)])
def test_more_new_tokens_than_positions_are_refused(new_tokens: int, max_tokens: int | None, virtual: int) -> None:
    """The error names max_new_tokens, also with virtual tokens, since fewer of them would not help."""
    sentence = (
        rf"^evaluate\.max_new_tokens={new_tokens} leaves no room for the input in the model's 64 positions; lower"
    )
    with pytest.raises(OutOfRangeError, match=sentence):
        layout_for_model(max_tokens, 64, virtual, new_tokens=new_tokens)
    assert layout_for_model(None, 64, new_tokens=63).max_new_tokens == 63


@pytest.mark.parametrize(("virtual", "left"), [(56, 8), (60, 4), (64, 0), (90, 0)])
def test_virtual_tokens_must_leave_room_for_new_tokens(virtual: int, left: int) -> None:
    """The error names both keys, since either can be lowered."""
    sentence = rf"^{virtual} virtual tokens leave {left} of the .*max_new_tokens=8 needs more; use fewer .* or lower"
    with pytest.raises(OutOfRangeError, match=sentence):
        layout_for_model(None, 64, virtual)


def test_model_without_max_positions_needs_max_length() -> None:
    """If the model's config has no maximum length, the recipe must set one."""
    with pytest.raises(OutOfRangeError, match=r"no number of positions; set data\.max_length"):
        layout_for_model(None, None)


@pytest.mark.parametrize("new_tokens", [32, 33])
def test_max_new_tokens_must_leave_room_for_an_article(new_tokens: int) -> None:
    """At least one token fewer than the length limit; the error has both numbers."""
    with pytest.raises(
        SequenceTooShortError, match=rf"max_length=32 is too short: .*max_new_tokens={new_tokens} leaves no room"
    ):
        layout_for_model(32, 64, new_tokens=new_tokens)
    assert layout_for_model(32, 64, new_tokens=31).max_new_tokens == 31


def test_separator_and_new_tokens_must_leave_room_for_an_article(tokenizer: PreTrainedTokenizerBase) -> None:
    """Separator, new tokens and one token of the article must fit the length limit."""
    separator = len(separator_ids(summary_encoder(tokenizer)))
    new_tokens = 64 - separator - 1
    encoder = summary_encoder(tokenizer, 64, new_tokens)
    assert len(encoder.encode_prompt(as_example(ARTICLE))) + new_tokens == 64
    sentence = (
        rf"the prompt of example 0 leaves no room for evaluate\.max_new_tokens={new_tokens + 1} in 64 tokens; "
        r"lower it, or raise data\.max_length"
    )
    with pytest.raises(SequenceTooShortError, match=sentence):
        summary_encoder(tokenizer, 64, new_tokens + 1).encode_prompt(as_example(ARTICLE))


def test_split_whose_prompts_leave_no_room_for_new_tokens_is_refused(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset
) -> None:
    """This holds for an evaluated split before the model runs; a split for training alone needs no room."""
    new_tokens = 64 - len(separator_ids(summary_encoder(tokenizer)))
    encoder, short = summary_encoder(tokenizer, 64, new_tokens), dataset.select(range(2))
    assert encoder.encode_split(short, "train", "refuse")[1] == 0
    sentence = (
        f"2 of 2 examples of the test split do not fit 64 tokens with {new_tokens} generated ones even when "
        "cut (example k0 needs 65); raise data.max_length, or set data.overlong=drop"
    )
    with pytest.raises(SequenceTooShortError, match=re.escape(sentence)):
        encoder.encode_split(short, "test", "refuse", is_evaluated=True)


# --- whole splits ----------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(write_rows: WriteRows) -> Dataset:
    """Return three examples of a file; the last summary has more than 40 tokens."""
    rows = [
        {"article": ARTICLE, "summary": summary, "key": f"k{index}"}
        for index, summary in enumerate((SUMMARY, "Yes.", SUMMARY * 9))
    ]
    return load_summaries(Files(train=write_rows("train.jsonl", rows), id="key"))


def test_encode_split_encodes_each_example_in_order(encoder: Encoder, dataset: Dataset) -> None:
    """The examples keep their order, and none is dropped if all fit."""
    encoded, dropped = encoder.encode_split(dataset, "train", "refuse")
    assert dropped == 0
    assert len(encoded) == len(dataset) == 3
    for row, source in zip(encoded, dataset, strict=True):
        example = encoder.encode_example(source)
        assert {key: row[key] for key in example} == example


def test_overlong_example_is_refused_with_its_length(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """The error has the number of overlong examples, the longest one, its length and the limit."""
    encoder = summary_encoder(tokenizer, 32, 8)
    needed = encoder.encode_example(as_example(ARTICLE, SUMMARY * 9))["needed"]
    assert needed > 32
    with pytest.raises(SequenceTooShortError) as error:
        encoder.encode_split(dataset, "train", "refuse")
    assert "1 of 3 examples of the train split do not fit 32 tokens" in str(error.value)
    assert f"(example k2 needs {needed}); raise data.max_length, or set data.overlong=drop" in str(error.value)


def test_needed_length_includes_one_token_of_article(tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> None:
    """At a limit of exactly ``needed`` tokens one token of the article is kept; at one less the example is refused."""
    needed = summary_encoder(tokenizer).encode_example(as_example(ARTICLE, SUMMARY * 9))["needed"]
    encoder = summary_encoder(tokenizer, needed, 4)
    encoded, dropped = encoder.encode_split(dataset, "train", "refuse")
    assert dropped == 0
    assert len(encoded[2]["input_ids"]) == needed
    assert find_prompt(encoded[2]) == 1 + len(separator_ids(encoder))
    with pytest.raises(SequenceTooShortError):
        summary_encoder(tokenizer, needed - 1, 4).encode_split(dataset, "train", "refuse")


def test_overlong_examples_are_dropped_and_counted(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """The other examples keep their order, and the number of dropped examples is returned."""
    encoded, dropped = summary_encoder(tokenizer, 32, 8).encode_split(dataset, "train", "drop")
    assert dropped == 1
    assert list(encoded["id"]) == ["k0", "k1"]
    assert max(map(len, encoded["input_ids"])) <= 32


def test_dropping_every_example_is_refused(write_rows: WriteRows, tokenizer: PreTrainedTokenizerBase) -> None:
    """If no example fits, nothing is left to train on."""
    path = write_rows("train.jsonl", [{"article": ARTICLE, "summary": SUMMARY * 9}])
    with pytest.raises(SequenceTooShortError, match="1 of 1 examples"):
        summary_encoder(tokenizer, 32, 8).encode_split(load_summaries(Files(train=path)), "train", "drop")


class CountingEncoder(Encoder):
    """Counts the examples that it encodes."""

    calls = 0

    def encode_batch(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        type(self).calls += len(examples)
        return super().encode_batch(examples)


def counting_encoder(
    tokenizer: PreTrainedTokenizerBase, layout: SequenceLayout = LAYOUT, task: Task | None = None
) -> CountingEncoder:
    """Return an encoder of articles and summaries, or of another task, that counts."""
    return CountingEncoder(tokenizer, layout, task or Summarization())


@pytest.fixture
def count_encoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that returns the number of examples encoded since its last call."""
    monkeypatch.setattr(CountingEncoder, "calls", 0)

    def count_since_last_call() -> int:
        count, CountingEncoder.calls = CountingEncoder.calls, 0
        return count

    return count_since_last_call


def test_encoded_split_is_cached(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, count_encoded: Callable[[], int]
) -> None:
    """A second, equal encoder reads the cache and returns the same examples."""
    first, _ = counting_encoder(tokenizer).encode_split(dataset, "train", "refuse")
    assert count_encoded() == 3
    second, _ = counting_encoder(tokenizer).encode_split(dataset, "train", "refuse")
    assert count_encoded() == 0
    assert second.to_dict() == first.to_dict()


@pytest.mark.parametrize(
    ("layout", "task"),
    [
        (SequenceLayout(120, 16), Summarization()),
        (SequenceLayout(128, 17), Summarization()),
        (LAYOUT, Summarization(separator=" =>")),
        (LAYOUT, Completion(prompt="article", completion="summary")),
    ],
    ids=["max_length", "max_new_tokens", "separator", "task"],
)
def test_another_layout_or_task_is_encoded_again(
    layout: SequenceLayout,
    task: Task,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    count_encoded: Callable[[], int],
) -> None:
    """The cache of one layout and task is not used for another."""
    if task.kind == "completion":
        dataset = dataset.add_column("prompt", dataset["article"]).add_column("completion", dataset["summary"])
    counting_encoder(tokenizer).encode_split(dataset, "train", "refuse")
    count_encoded()
    encoded, _ = counting_encoder(tokenizer, layout, task).encode_split(dataset, "train", "refuse")
    assert count_encoded() == 3
    assert encoded[0]["input_ids"] == Encoder(tokenizer, layout, task).encode_example(dataset[0])["input_ids"]


def test_another_tokenizer_is_encoded_again(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, count_encoded: Callable[[], int]
) -> None:
    """The cache of one tokenizer is not used for another of the same class."""
    counting_encoder(tokenizer).encode_split(dataset, "train", "refuse")
    for other in (word_tokenizer(), word_tokenizer(first_word="The"), word_tokenizer(start="<s>")):
        count_encoded()
        encoded, _ = counting_encoder(other).encode_split(dataset, "train", "refuse")
        assert count_encoded() == 3
        assert encoded[0]["input_ids"] == summary_encoder(other).encode_example(dataset[0])["input_ids"]


def test_tokenizer_hash_depends_on_its_behavior(tokenizer: PreTrainedTokenizerBase) -> None:
    """Equal tokenizers have the same hash; another vocabulary, start token or end token changes it."""
    tokenizers = [word_tokenizer(), word_tokenizer(start="<s>"), word_tokenizer(end="<s>"), tokenizer]
    assert len({hash_tokenizer(other) for other in tokenizers}) == len(tokenizers)
    assert hash_tokenizer(word_tokenizer()) == hash_tokenizer(tokenizers[0])


# --- control tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("article", "summary"),
    [
        ("A page about tokenizers.", "Page 1: <|endoftext|> is between documents."),
        ("<|endoftext|>", "An article that is only its name."),
        ("Twice <|endoftext|><|endoftext|> here.", "<|endoftext|> first."),
        ("At the end <|endoftext|>", "And here <|endoftext|>"),
    ],
)
def test_name_of_a_control_token_is_text(article: str, summary: str, encoder: Encoder) -> None:
    """Only the last id ends the summary, and decoding gives the texts back."""
    example = encoder.encode_example(as_example(article, summary))
    ids, prompt = example["input_ids"], find_prompt(example)
    assert ids.count(encoder.eos_token_id) == 1
    assert ids[-1] == encoder.eos_token_id
    assert encoder.decode(ids[prompt:]) == summary
    assert encoder.tokenizer.decode(ids[: prompt - len(separator_ids(encoder))]) == article
    assert encoder.eos_token_id not in encoder.encode_prompt(as_example(article))
    assert example["control_tokens"] == 0


def test_control_token_that_cannot_be_split_is_counted() -> None:
    """This tokenizer knows the name only as the control token; unknown text is not counted."""
    from tokenizers import pre_tokenizers

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = summary_encoder(tokenizer, 32, 8, "=")
    assert encoder.encode_example(as_example("a <e> bb", "cc <e>"))["control_tokens"] == 2
    assert encoder.encode_example(as_example("a zzz bb", "cc"))["control_tokens"] == 0


def test_cut_examples_are_counted(encoder: Encoder) -> None:
    """The number of tokens that the article lost."""
    assert encoder.encode_example(as_example("The council met.", SUMMARY))["cut_tokens"] == 0
    example = encoder.encode_example(as_example(ARTICLE, SUMMARY))
    kept = find_prompt(example) - len(separator_ids(encoder))
    assert example["cut_tokens"] == len(encoder.tokenizer(ARTICLE)["input_ids"]) - kept > 0
