"""Encoding of examples: only the article is truncated, and a prompt is tokenized as in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peftbench.data.collate import Collator
from peftbench.data.encode import Encoder, SequenceLayout, hash_tokenizer
from peftbench.data.sources import Files
from peftbench.errors import OutOfRangeError, SequenceTooShortError
from peftbench.recipe.schema import Data
from tests.helpers.batches import labels_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

WriteRows = Callable[[str, Sequence[dict[str, Any]]], str]
SEPARATOR = "\nTL;DR:"
ARTICLE = "The council met in the morning and voted on the bridge. " * 20
SUMMARY = "Council votes on bridge."
UNKNOWN = "<u>"


def layout(max_tokens: int = 128, new_tokens: int = 16, separator: str = SEPARATOR) -> SequenceLayout:
    """Return a layout with room for a summary and part of an article."""
    return SequenceLayout(max_tokens, separator, new_tokens)


def word_tokenizer(
    start: str | None = None, end: str = "<e>", append_end: bool = False, first_word: str = "a"
) -> PreTrainedTokenizerBase:
    """Return a tokenizer of whole words that adds ``start`` before a text and, with ``append_end``, ``end`` after it.

    ``first_word`` has the id 3.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = [UNKNOWN, "<e>", "<s>", first_word, "bb", "cc", "=", ">"]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    template = f"{start + ' ' if start else ''}$A{' ' + end if append_end else ''}"
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=template, special_tokens=[(token, vocabulary.index(token)) for token in ("<s>", "<e>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, unk_token=UNKNOWN)


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Return an encoder with the shipped base model's tokenizer, whose pad token is its end token."""
    return Encoder(tokenizer, layout())


# --- one example -----------------------------------------------------------------------------------------------------


def test_sequence_is_article_separator_summary_end(encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Each part is encoded separately, and one space is between separator and summary."""
    example = encoder.encode_example("A short article.", SUMMARY)
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("A short article.", SEPARATOR)]
    summary = tokenizer(" " + SUMMARY, add_special_tokens=False)["input_ids"]
    assert example["input_ids"] == [*parts[0], *parts[1], *summary, tokenizer.eos_token_id]
    assert example["prompt_tokens"] == len(parts[0]) + len(parts[1])
    assert tokenizer.decode(example["input_ids"][:-1]) == f"A short article.{SEPARATOR} {SUMMARY}"


@pytest.mark.parametrize("max_tokens", [32, 40, 64, 512])
def test_only_the_article_is_truncated(max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """At every length limit, the start of the article and the whole separator, summary and end token are kept."""
    example = Encoder(tokenizer, layout(max_tokens, 8)).encode_example(ARTICLE, SUMMARY)
    ids, prompt = example["input_ids"], example["prompt_tokens"]
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
    short_example, long_example = encoder.encode_example("Short.", SUMMARY), encoder.encode_example(ARTICLE, SUMMARY)
    collator = Collator(pad_token_id=encoder.eos_token_id)
    batch = collator.collate(
        [short_example["input_ids"], long_example["input_ids"]],
        [short_example["prompt_tokens"], long_example["prompt_tokens"]],
    )
    for row, example in enumerate((short_example, long_example)):
        length, prompt = len(example["input_ids"]), example["prompt_tokens"]
        labels = labels_of(batch)[row].tolist()
        assert labels[:prompt] == [-100] * prompt
        assert labels[prompt:length] == example["input_ids"][prompt:]
        assert labels[length - 1] == encoder.eos_token_id
        assert labels[length:] == [-100] * (len(labels) - length)
    assert batch.input_ids[0, -1] == encoder.eos_token_id  # the short row is padded with the same id


def test_spaces_around_a_summary_are_ignored(encoder: Encoder) -> None:
    """A summary is encoded equally with and without spaces and line breaks around it."""
    assert encoder.encode_example("Text.", f"  {SUMMARY}\n") == encoder.encode_example("Text.", SUMMARY)


@pytest.mark.parametrize("separator", ["TL;DR: ", " ", ""])
def test_separator_that_ends_in_a_space_is_refused(separator: str) -> None:
    """A trailing space would be tokenized differently in generation and in training."""
    with pytest.raises(ValueError, match="must be non-empty text that does not end in a space"):
        Data(source=Files(train="x.csv"), separator=separator)
    assert Data(source=Files(train="x.csv"), separator="TL;DR:\n").separator == "TL;DR:\n"


# --- prompts ---------------------------------------------------------------------------------------------------------

ARTICLES = ["A short article.", "ends in spaces   ", "", "line\nbreaks\n", "naïve – “quotes” 日本 🙂", ARTICLE[:200]]


@pytest.mark.parametrize("article", ARTICLES)
@pytest.mark.parametrize("separator", [SEPARATOR, " =>", "\n\nSummary:\n"])
def test_prompt_equals_the_prefix_in_training(article: str, separator: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """If nothing is truncated, a prompt has exactly the tokens before the first label in training."""
    encoder = Encoder(tokenizer, layout(separator=separator))
    example = encoder.encode_example(article, SUMMARY)
    assert len(example["input_ids"]) < encoder.layout.max_length  # nothing was truncated
    assert encoder.encode_prompt(article) == example["input_ids"][: example["prompt_tokens"]]


def test_prompt_equals_the_start_of_the_tokenized_whole_text(
    encoder: Encoder, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Encoding the parts separately gives the tokens of the whole text, so generation continues normal text."""
    whole = tokenizer(f"A short article.{SEPARATOR} {SUMMARY}", add_special_tokens=False)["input_ids"]
    prompt = encoder.encode_prompt("A short article.")
    assert whole[: len(prompt)] == prompt


def test_prompt_reserves_room_for_new_tokens(encoder: Encoder) -> None:
    """A long article is truncated until the new tokens fit after the whole separator."""
    for reserved_tokens in (None, 1, 60):
        prompt = encoder.encode_prompt(ARTICLE, reserved_tokens)
        new_tokens = encoder.layout.max_new_tokens if reserved_tokens is None else reserved_tokens
        assert len(prompt) + new_tokens == encoder.layout.max_length
        assert prompt[-len(encoder.separator_ids) :] == encoder.separator_ids


def test_decoding_stops_at_the_first_end_token(encoder: Encoder) -> None:
    """Tokens after the first end token, and spaces around the text, are not in the summary."""
    ids = encoder.encode_example("", SUMMARY)["input_ids"][len(encoder.separator_ids) :]
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
    encoder = Encoder(make_tokenizer(), layout(separator="=>"))
    example = encoder.encode_example("a bb", "cc")
    assert example["input_ids"] == [*start, 3, 4, *encoder.separator_ids, 5, 1]
    assert encoder.encode_prompt("a bb") == example["input_ids"][: example["prompt_tokens"]]
    assert example["needed"] == len(start) + 1 + len(encoder.separator_ids) + 2
    truncated = encoder.encode_example("a bb " * 200, "cc")["input_ids"]
    assert truncated[: len(start)] == start
    assert len(truncated) == encoder.layout.max_length


def test_llama_tokenizer_adds_one_start_token(shared_data: Path) -> None:
    """The tokenizer of a small Llama adds its start token once, before the article."""
    folder = shared_data / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("the model stories260K is not in the shared data")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = Encoder(tokenizer, layout()).encode_example("Once upon a time.", SUMMARY)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1


def test_tokenizer_without_an_end_token_is_refused() -> None:
    """Without an end token a model cannot learn to stop."""
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(OutOfRangeError, match="has no end-of-sequence token"):
        Encoder(tokenizer, layout())


# --- layout ----------------------------------------------------------------------------------------------------------


def layout_for_model(
    max_tokens: int | None, positions: int | None, virtual_tokens: int = 0, new_tokens: int = 8
) -> SequenceLayout:
    """Return the layout for a model with this many positions."""
    return SequenceLayout.for_model(
        separator=SEPARATOR,
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
    separator = len(Encoder(tokenizer, layout()).separator_ids)
    new_tokens = 64 - separator - 1
    encoder = Encoder(tokenizer, layout(64, new_tokens))
    assert len(encoder.encode_prompt(ARTICLE)) + new_tokens == 64
    with pytest.raises(SequenceTooShortError, match=f"max_new_tokens={new_tokens + 1} and {separator} tokens of separ"):
        Encoder(tokenizer, layout(64, new_tokens + 1))


# --- whole splits ----------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(write_rows: WriteRows) -> Dataset:
    """Return three examples of a file; the last summary has more than 40 tokens."""
    rows = [
        {"article": ARTICLE, "summary": summary, "key": f"k{index}"}
        for index, summary in enumerate((SUMMARY, "Yes.", SUMMARY * 9))
    ]
    return Files(train=write_rows("train.jsonl", rows), id="key").load("train")


def test_encode_split_encodes_each_example_in_order(encoder: Encoder, dataset: Dataset) -> None:
    """The examples keep their order, and none is dropped if all fit."""
    encoded, dropped = encoder.encode_split(dataset, "train", "refuse")
    assert dropped == 0
    assert len(encoded) == len(dataset) == 3
    for row, source in zip(encoded, dataset, strict=True):
        example = encoder.encode_example(source["article"], source["summary"])
        assert {key: row[key] for key in example} == example


def test_overlong_example_is_refused_with_its_length(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """The error has the number of overlong examples, the longest one, its length and the limit."""
    encoder = Encoder(tokenizer, layout(32, 8))
    needed = encoder.encode_example(ARTICLE, SUMMARY * 9)["needed"]
    assert needed > 32
    with pytest.raises(SequenceTooShortError) as error:
        encoder.encode_split(dataset, "train", "refuse")
    assert "1 of 3 examples of the train split do not fit 32 tokens" in str(error.value)
    assert f"(k2 needs {needed})" in str(error.value)


def test_needed_length_includes_one_token_of_article(tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> None:
    """At a limit of exactly ``needed`` tokens one token of the article is kept; at one less the example is refused."""
    needed = Encoder(tokenizer, layout()).encode_example(ARTICLE, SUMMARY * 9)["needed"]
    encoder = Encoder(tokenizer, layout(needed, 4))
    encoded, dropped = encoder.encode_split(dataset, "train", "refuse")
    assert dropped == 0
    assert len(encoded[2]["input_ids"]) == needed
    assert encoded[2]["prompt_tokens"] == 1 + len(encoder.separator_ids)
    with pytest.raises(SequenceTooShortError):
        Encoder(tokenizer, layout(needed - 1, 4)).encode_split(dataset, "train", "refuse")


def test_overlong_examples_are_dropped_and_counted(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """The other examples keep their order, and the number of dropped examples is returned."""
    encoded, dropped = Encoder(tokenizer, layout(32, 8)).encode_split(dataset, "train", "drop")
    assert dropped == 1
    assert list(encoded["id"]) == ["k0", "k1"]
    assert max(map(len, encoded["input_ids"])) <= 32


def test_dropping_every_example_is_refused(write_rows: WriteRows, tokenizer: PreTrainedTokenizerBase) -> None:
    """If no example fits, nothing is left to train on."""
    path = write_rows("train.jsonl", [{"article": ARTICLE, "summary": SUMMARY * 9}])
    with pytest.raises(SequenceTooShortError, match="1 of 1 examples"):
        Encoder(tokenizer, layout(32, 8)).encode_split(Files(train=path).load("train"), "train", "drop")


class CountingEncoder(Encoder):
    """Counts the examples that it encodes."""

    calls = 0

    def encode_example(self, article: str, summary: str) -> dict[str, Any]:
        type(self).calls += 1
        return super().encode_example(article, summary)


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
    first, _ = CountingEncoder(tokenizer, layout()).encode_split(dataset, "train", "refuse")
    assert count_encoded() == 3
    second, _ = CountingEncoder(tokenizer, layout()).encode_split(dataset, "train", "refuse")
    assert count_encoded() == 0
    assert second.to_dict() == first.to_dict()


@pytest.mark.parametrize(
    "other",
    [layout(120), layout(separator=" =>"), layout(new_tokens=17)],
    ids=["max_tokens", "separator", "new_tokens"],
)
def test_another_layout_is_encoded_again(
    other: SequenceLayout, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, count_encoded: Callable[[], int]
) -> None:
    """The cache of one layout is not used for another."""
    CountingEncoder(tokenizer, layout()).encode_split(dataset, "train", "refuse")
    count_encoded()
    encoded, _ = CountingEncoder(tokenizer, other).encode_split(dataset, "train", "refuse")
    assert count_encoded() == 3
    assert encoded[0]["input_ids"] == Encoder(tokenizer, other).encode_example(ARTICLE, SUMMARY)["input_ids"]


def test_another_tokenizer_is_encoded_again(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, count_encoded: Callable[[], int]
) -> None:
    """The cache of one tokenizer is not used for another of the same class."""
    CountingEncoder(tokenizer, layout()).encode_split(dataset, "train", "refuse")
    for other in (word_tokenizer(), word_tokenizer(first_word="The"), word_tokenizer(start="<s>")):
        count_encoded()
        encoded, _ = CountingEncoder(other, layout()).encode_split(dataset, "train", "refuse")
        assert count_encoded() == 3
        assert encoded[0]["input_ids"] == Encoder(other, layout()).encode_example(ARTICLE, SUMMARY)["input_ids"]


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
    example = encoder.encode_example(article, summary)
    ids, prompt_tokens = example["input_ids"], example["prompt_tokens"]
    assert ids.count(encoder.eos_token_id) == 1
    assert ids[-1] == encoder.eos_token_id
    assert encoder.decode(ids[prompt_tokens:]) == summary
    assert encoder.tokenizer.decode(ids[: prompt_tokens - len(encoder.separator_ids)]) == article
    assert encoder.eos_token_id not in encoder.encode_prompt(article)
    assert example["control_tokens"] == 0


def test_control_token_that_cannot_be_split_is_counted() -> None:
    """This tokenizer knows the name only as the control token; unknown text is not counted."""
    from tokenizers import pre_tokenizers

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = Encoder(tokenizer, layout(32, 8, "="))
    assert encoder.encode_example("a <e> bb", "cc <e>")["control_tokens"] == 2
    assert encoder.encode_example("a zzz bb", "cc")["control_tokens"] == 0


def test_cut_examples_are_counted(encoder: Encoder) -> None:
    """The number of tokens that the article lost."""
    assert encoder.encode_example("The council met.", SUMMARY)["cut_tokens"] == 0
    example = encoder.encode_example(ARTICLE, SUMMARY)
    kept = example["prompt_tokens"] - len(encoder.separator_ids)
    assert example["cut_tokens"] == len(encoder.tokenizer(ARTICLE)["input_ids"]) - kept > 0
