"""From text to token ids: only the article is ever shortened, and a prompt is tokenised as in training."""

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
    """A layout with room for a summary and some article."""
    return SequenceLayout(max_tokens, separator, new_tokens)


def word_tokenizer(
    start: str | None = None, end: str = "<e>", after: bool = False, a: str = "a"
) -> PreTrainedTokenizerBase:
    """A tokenizer of words that puts ``start`` before every text of its own accord, and ``end`` after it if asked.

    ``a`` is its word with the id 3.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [UNKNOWN, "<e>", "<s>", a, "bb", "cc", "=", ">"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    template = f"{start + ' ' if start else ''}$A{' ' + end if after else ''}"
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=template, special_tokens=[(token, words.index(token)) for token in ("<s>", "<e>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, unk_token=UNKNOWN)


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The shipped base's tokenizer, whose pad token is its end token."""
    return Encoder(tokenizer, layout())


# --- one example -----------------------------------------------------------------------------------------------------


def test_a_sequence_is_article_separator_summary_end(encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> None:
    """The parts stand in this order, each encoded apart, and the summary follows the separator with one space."""
    made = encoder.encode_example("A short article.", SUMMARY)
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("A short article.", SEPARATOR)]
    summary = tokenizer(" " + SUMMARY, add_special_tokens=False)["input_ids"]
    assert made["input_ids"] == [*parts[0], *parts[1], *summary, tokenizer.eos_token_id]
    assert made["prompt_tokens"] == len(parts[0]) + len(parts[1])
    assert tokenizer.decode(made["input_ids"][:-1]) == f"A short article.{SEPARATOR} {SUMMARY}"


@pytest.mark.parametrize("max_tokens", [32, 40, 64, 512])
def test_only_the_article_is_shortened(max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """However little room there is, the article's beginning, the whole separator, summary and end token are in it."""
    made = Encoder(tokenizer, layout(max_tokens, 8)).encode_example(ARTICLE, SUMMARY)
    ids, prompt = made["input_ids"], made["prompt_tokens"]
    article = tokenizer(ARTICLE, add_special_tokens=False)["input_ids"]
    separator = tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]
    target = [*tokenizer(" " + SUMMARY, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    kept = prompt - len(separator)
    assert ids[prompt:] == target
    assert ids[:prompt] == [*article[:kept], *separator]
    assert 0 < kept <= len(article)
    assert len(ids) == min(max_tokens, len(article) + len(separator) + len(target))


def test_summary_and_end_token_are_labelled_even_where_pad_is_end(encoder: Encoder) -> None:
    """With one id for padding and end, the end token enters the loss and the padding behind it does not."""
    short, long = encoder.encode_example("Short.", SUMMARY), encoder.encode_example(ARTICLE, SUMMARY)
    collator = Collator(pad_token_id=encoder.eos_token_id)
    batch = collator.collate([short["input_ids"], long["input_ids"]], [short["prompt_tokens"], long["prompt_tokens"]])
    for row, made in enumerate((short, long)):
        length, prompt = len(made["input_ids"]), made["prompt_tokens"]
        labels = labels_of(batch)[row].tolist()
        assert labels[:prompt] == [-100] * prompt
        assert labels[prompt:length] == made["input_ids"][prompt:]
        assert labels[length - 1] == encoder.eos_token_id
        assert labels[length:] == [-100] * (len(labels) - length)
    assert batch.input_ids[0, -1] == encoder.eos_token_id  # the short row is padded with the very id that is labelled


def test_blank_ends_of_a_summary_do_not_count(encoder: Encoder) -> None:
    """A summary is the same with and without blanks around it."""
    assert encoder.encode_example("Text.", f"  {SUMMARY}\n") == encoder.encode_example("Text.", SUMMARY)


@pytest.mark.parametrize("separator", ["TL;DR: ", " ", ""])
def test_a_separator_that_ends_in_a_space_is_refused(separator: str) -> None:
    """The space would be tokenised otherwise in generation than in training, so the recipe refuses it."""
    with pytest.raises(ValueError, match="must be non-empty text that does not end in a space"):
        Data(source=Files(train="x.csv"), separator=separator)
    assert Data(source=Files(train="x.csv"), separator="TL;DR:\n").separator == "TL;DR:\n"


# --- prompts ---------------------------------------------------------------------------------------------------------

ARTICLES = ["A short article.", "ends in spaces   ", "", "line\nbreaks\n", "naïve – “quotes” 日本 🙂", ARTICLE[:200]]


@pytest.mark.parametrize("article", ARTICLES)
@pytest.mark.parametrize("separator", [SEPARATOR, " =>", "\n\nSummary:\n"])
def test_a_prompt_is_the_prefix_that_was_trained_on(
    article: str, separator: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Where nothing is shortened, generation starts from exactly the tokens that stand before a label in training."""
    encoder = Encoder(tokenizer, layout(separator=separator))
    made = encoder.encode_example(article, SUMMARY)
    assert len(made["input_ids"]) < encoder.layout.max_length  # nothing was shortened
    assert encoder.encode_prompt(article) == made["input_ids"][: made["prompt_tokens"]]


def test_a_prompt_is_what_the_whole_text_begins_with(encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Parts encoded apart are the tokens of the text in one piece, so what follows a prompt is an ordinary word."""
    whole = tokenizer(f"A short article.{SEPARATOR} {SUMMARY}", add_special_tokens=False)["input_ids"]
    prompt = encoder.encode_prompt("A short article.")
    assert whole[: len(prompt)] == prompt


def test_a_prompt_leaves_the_room_that_is_asked_for(encoder: Encoder) -> None:
    """A long article is shortened until the new tokens fit behind it, and the separator is whole."""
    for room in (None, 1, 60):
        prompt = encoder.encode_prompt(ARTICLE, room)
        wanted = encoder.layout.max_new_tokens if room is None else room
        assert len(prompt) + wanted == encoder.layout.max_length
        assert prompt[-len(encoder.separator_ids) :] == encoder.separator_ids


def test_decoding_stops_at_the_first_end_token(encoder: Encoder) -> None:
    """What a model writes after its end token, and blanks around the text, are not its summary."""
    ids = encoder.encode_example("", SUMMARY)["input_ids"][len(encoder.separator_ids) :]
    assert encoder.decode([*ids, *ids]) == SUMMARY
    assert encoder.decode(ids[:-1]) == SUMMARY
    assert encoder.decode([encoder.eos_token_id, *ids]) == ""


# --- start tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "start"),
    [
        (word_tokenizer, []),
        (lambda: word_tokenizer(start="<s>"), [2]),
        (lambda: word_tokenizer(start="<s>", after=True), [2]),
        (lambda: word_tokenizer(after=True), []),
        (lambda: word_tokenizer(start="<e>"), [1]),
    ],
    ids=["none", "start", "start and end", "end", "the end token at the start"],
)
def test_a_start_token_comes_once_at_the_start(make: Callable[[], PreTrainedTokenizerBase], start: list[int]) -> None:
    """What a tokenizer puts before a text stands before the article alone; the end token stands at the end alone."""
    encoder = Encoder(make(), layout(separator="=>"))
    made = encoder.encode_example("a bb", "cc")
    assert made["input_ids"] == [*start, 3, 4, *encoder.separator_ids, 5, 1]
    assert encoder.encode_prompt("a bb") == made["input_ids"][: made["prompt_tokens"]]
    assert made["needed"] == len(start) + 1 + len(encoder.separator_ids) + 2
    shortened = encoder.encode_example("a bb " * 200, "cc")["input_ids"]
    assert shortened[: len(start)] == start
    assert len(shortened) == encoder.layout.max_length


def test_a_real_llama_tokenizer_starts_once(shared_data: Path) -> None:
    """A small Llama's tokenizer gives its start token once, before the article."""
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


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    """A model that cannot learn to stop is refused."""
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(OutOfRangeError, match="has no end-of-sequence token"):
        Encoder(tokenizer, layout())


# --- layout ----------------------------------------------------------------------------------------------------------


def fit(max_tokens: int | None, positions: int | None, virtual_tokens: int = 0, new_tokens: int = 8) -> SequenceLayout:
    """A layout for a model of so many positions."""
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
def test_a_layout_fills_what_virtual_tokens_leave(
    max_tokens: int | None, positions: int | None, virtual: int, expected: int
) -> None:
    """Without a limit a sequence may be as long as the positions that the method leaves; a limit is kept."""
    assert fit(max_tokens, positions, virtual).max_length == expected


def test_real_and_virtual_tokens_must_fit_the_positions() -> None:
    """One token too many is refused with all three numbers and the one that would do."""
    with pytest.raises(OutOfRangeError, match=r"max_length=45 and 20 virtual tokens exceed the model's 64 .*=44 or le"):
        fit(45, 64, 20)


def test_a_model_without_positions_needs_a_limit() -> None:
    """Where the config does not say how long a sequence may be, the recipe must."""
    with pytest.raises(OutOfRangeError, match=r"no number of positions; set data\.max_length"):
        fit(None, None)


@pytest.mark.parametrize("new_tokens", [32, 33])
def test_a_summary_must_leave_room_for_an_article(new_tokens: int) -> None:
    """As many new tokens as a sequence has, or more, are refused with both numbers."""
    with pytest.raises(SequenceTooShortError, match=rf"max_new_tokens={new_tokens} leaves no room .* in 32 tokens"):
        fit(32, 64, new_tokens=new_tokens)
    assert fit(32, 64, new_tokens=31).max_new_tokens == 31


def test_separator_and_summary_must_leave_room_for_an_article(tokenizer: PreTrainedTokenizerBase) -> None:
    """A prompt and its new tokens never exceed the longest sequence: one token of article must fit beside them."""
    separator = len(Encoder(tokenizer, layout()).separator_ids)
    new_tokens = 64 - separator - 1
    fits = Encoder(tokenizer, layout(64, new_tokens))
    assert len(fits.encode_prompt(ARTICLE)) + new_tokens == 64
    with pytest.raises(SequenceTooShortError, match=f"max_new_tokens={new_tokens + 1} and {separator} tokens of separ"):
        Encoder(tokenizer, layout(64, new_tokens + 1))


# --- whole splits ----------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(write_rows: WriteRows) -> Dataset:
    """Three examples of a file, the last with a summary that takes 40 tokens and more."""
    rows = [
        {"article": ARTICLE, "summary": text, "key": f"k{n}"} for n, text in enumerate((SUMMARY, "Yes.", SUMMARY * 9))
    ]
    return Files(train=write_rows("train.jsonl", rows), id="key").load("train")


def test_encoding_a_split_encodes_each_example(encoder: Encoder, dataset: Dataset) -> None:
    """A split is its examples in order, and none is dropped where all fit."""
    encoded, dropped = encoder.encode_split(dataset, "train", "refuse")
    assert dropped == 0
    assert len(encoded) == len(dataset) == 3
    for row, source in zip(encoded, dataset, strict=True):
        made = encoder.encode_example(source["article"], source["summary"])
        assert {key: row[key] for key in made} == made


def test_an_example_that_does_not_fit_is_refused_with_the_numbers(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The sentence says how many do not fit, which one is longest, what it needs and what there is."""
    encoder = Encoder(tokenizer, layout(32, 8))
    needed = encoder.encode_example(ARTICLE, SUMMARY * 9)["needed"]
    assert needed > 32
    with pytest.raises(SequenceTooShortError) as caught:
        encoder.encode_split(dataset, "train", "refuse")
    assert "1 of 3 examples of the train split do not fit 32 tokens" in str(caught.value)
    assert f"(k2 needs {needed})" in str(caught.value)


def test_needed_is_what_one_token_of_article_takes(tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> None:
    """With exactly the tokens needed an example is taken, with one token of article; with one less it is not."""
    needed = Encoder(tokenizer, layout()).encode_example(ARTICLE, SUMMARY * 9)["needed"]
    encoder = Encoder(tokenizer, layout(needed, 4))
    encoded, dropped = encoder.encode_split(dataset, "train", "refuse")
    assert dropped == 0
    assert len(encoded[2]["input_ids"]) == needed
    assert encoded[2]["prompt_tokens"] == 1 + len(encoder.separator_ids)
    with pytest.raises(SequenceTooShortError):
        Encoder(tokenizer, layout(needed - 1, 4)).encode_split(dataset, "train", "refuse")


def test_examples_that_do_not_fit_can_be_dropped_and_are_counted(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Those that fit stay in order, and the number of the others is told."""
    encoded, dropped = Encoder(tokenizer, layout(32, 8)).encode_split(dataset, "train", "drop")
    assert dropped == 1
    assert list(encoded["id"]) == ["k0", "k1"]
    assert max(map(len, encoded["input_ids"])) <= 32


def test_dropping_everything_is_refused(write_rows: WriteRows, tokenizer: PreTrainedTokenizerBase) -> None:
    """Where no example fits there is nothing to train on."""
    path = write_rows("train.jsonl", [{"article": ARTICLE, "summary": SUMMARY * 9}])
    with pytest.raises(SequenceTooShortError, match="1 of 1 examples"):
        Encoder(tokenizer, layout(32, 8)).encode_split(Files(train=path).load("train"), "train", "drop")


class Counting(Encoder):
    """An encoder that counts the examples it encodes."""

    calls = 0

    def encode_example(self, article: str, summary: str) -> dict[str, Any]:
        type(self).calls += 1
        return super().encode_example(article, summary)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many examples were encoded since the last time it was asked."""
    monkeypatch.setattr(Counting, "calls", 0)

    def since() -> int:
        count, Counting.calls = Counting.calls, 0
        return count

    return since


def test_a_split_is_encoded_once(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, calls: Callable[[], int]
) -> None:
    """A second encoder like the first finds the first one's work in the cache, with the same result."""
    first, _ = Counting(tokenizer, layout()).encode_split(dataset, "train", "refuse")
    assert calls() == 3
    again, _ = Counting(tokenizer, layout()).encode_split(dataset, "train", "refuse")
    assert calls() == 0
    assert again.to_dict() == first.to_dict()


@pytest.mark.parametrize(
    "other",
    [layout(120), layout(separator=" =>"), layout(new_tokens=17)],
    ids=["max_tokens", "separator", "new_tokens"],
)
def test_another_layout_is_encoded_anew(
    other: SequenceLayout, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, calls: Callable[[], int]
) -> None:
    """What was encoded under one layout is not taken for another."""
    Counting(tokenizer, layout()).encode_split(dataset, "train", "refuse")
    calls()
    encoded, _ = Counting(tokenizer, other).encode_split(dataset, "train", "refuse")
    assert calls() == 3
    assert encoded[0]["input_ids"] == Encoder(tokenizer, other).encode_example(ARTICLE, SUMMARY)["input_ids"]


def test_another_tokenizer_is_encoded_anew(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, calls: Callable[[], int]
) -> None:
    """What one tokenizer encoded is not taken for another's, though they have the same class."""
    Counting(tokenizer, layout()).encode_split(dataset, "train", "refuse")
    for other in (word_tokenizer(), word_tokenizer(a="The"), word_tokenizer(start="<s>")):
        calls()
        encoded, _ = Counting(other, layout()).encode_split(dataset, "train", "refuse")
        assert calls() == 3
        assert encoded[0]["input_ids"] == Encoder(other, layout()).encode_example(ARTICLE, SUMMARY)["input_ids"]


def test_the_fingerprint_is_of_what_a_tokenizer_does(tokenizer: PreTrainedTokenizerBase) -> None:
    """Two tokenizers alike have one fingerprint; another vocabulary, start or end token has another."""
    made = [word_tokenizer(), word_tokenizer(start="<s>"), word_tokenizer(end="<s>"), tokenizer]
    assert len({hash_tokenizer(each) for each in made}) == len(made)
    assert hash_tokenizer(word_tokenizer()) == hash_tokenizer(made[0])
