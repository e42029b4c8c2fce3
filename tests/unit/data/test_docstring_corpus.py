"""The offline corpus: split by package, nothing held out is trained on, made once an environment."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from peftbench.data import docstring_corpus
from peftbench.data.docstring_corpus import (
    HELD_OUT_PACKAGES,
    SPLITS,
    Corpus,
    build_corpus,
    cache_pair_files,
    environment_key,
    read_corpus,
)
from peftbench.data.docstring_parser import Docstring, SummarizationPair, normalize_text
from peftbench.data.sources import Docstrings
from peftbench.errors import OutputError

VALIDATION, TEST = (
    next(name for name, split in HELD_OUT_PACKAGES.items() if split == want) for want in ("validation", "test")
)


def text(topic: str, body: str | None = None) -> str:
    """A docstring that is a pair; two of them share nothing unless told to."""
    return f"Say something short about {topic}.\n\n" + (body or f"The body tells of {topic} at length. " * 6)


def docstring(package: str, content: str) -> Docstring:
    """A docstring of that package."""
    return Docstring(package, f"{package}.py:{len(content)}", content)


def summaries(corpus: Corpus) -> dict[str, list[str]]:
    """What each split's pairs are about."""
    start = len("Say something short about ")
    return {split: [pair.summary[start:-1] for pair in corpus.pairs[split]] for split in SPLITS}


def test_splits_by_package() -> None:
    """Held-out packages go to their split alone, all others to training, in whatever order they are read."""
    found = [docstring(package, text(f"apples of {package}")) for package in (TEST, "numpy", VALIDATION, "python")]
    expected = {
        "train": ["apples of numpy", "apples of python"],
        "validation": [f"apples of {VALIDATION}"],
        "test": [f"apples of {TEST}"],
    }
    assert summaries(build_corpus(found)) == expected
    corpus = build_corpus(reversed(found))
    assert {split: set(names) for split, names in summaries(corpus).items()} == {
        split: set(names) for split, names in expected.items()
    }
    packages = {split: {pair.package for pair in corpus.pairs[split]} for split in SPLITS}
    assert packages["train"].isdisjoint(HELD_OUT_PACKAGES)


@pytest.mark.parametrize("package", [VALIDATION, TEST])
@pytest.mark.parametrize(
    "copied",
    [
        text("pears"),
        text("pears").upper().replace("\n\n", "\n\n\n"),
        text("pears", body="Another body, of the held-out package alone. " * 5),
        text("plums", body="The body tells of pears at length. " * 6),
    ],
    ids=["whole", "whole but for case and spaces", "summary", "body"],
)
def test_what_both_sides_have_is_trained_on_only(package: str, copied: str) -> None:
    """A copied docstring, summary line or body is dropped from the held-out side, pairs and documents both."""
    corpus = build_corpus(
        [docstring(package, copied), docstring(package, text("figs")), docstring("numpy", text("pears"))]
    )
    split = HELD_OUT_PACKAGES[package]
    assert summaries(corpus)["train"] == ["pears"]
    assert summaries(corpus)[split] == ["figs"]
    assert corpus.documents[split] == [text("figs")]


def test_a_training_text_that_is_no_pair_counts_too() -> None:
    """A summary line that training has without a body is known to training."""
    lone = "Say something short about pears."
    corpus = build_corpus([docstring("numpy", lone), docstring(TEST, text("pears")), docstring(TEST, text("figs"))])
    assert corpus.documents["train"] == [lone]
    assert summaries(corpus)["test"] == ["figs"]


def test_copies_within_a_split_count_once() -> None:
    """A docstring that several packages have is one document and one pair; one body makes one pair."""
    corpus = build_corpus(
        [
            docstring("numpy", text("pears")),
            docstring("scipy", text("pears")),
            docstring("scipy", text("plums", body="The body tells of pears at length. " * 6)),
        ]
    )
    assert summaries(corpus)["train"] == ["pears"]
    assert len(corpus.documents["train"]) == 2


def example(article: str, split: str = "train") -> Corpus:
    """A corpus of one pair."""
    corpus = Corpus()
    corpus.pairs[split].append(SummarizationPair("package", "where", article, "summary"))
    return corpus


def test_the_fingerprint_is_of_every_pair() -> None:
    """Equal corpora have one fingerprint; any field, the split or the order of pairs changes it, documents do not."""
    corpus = example("article")
    assert corpus.fingerprint() == example("article").fingerprint()
    corpus.documents["train"].append("text")
    assert corpus.fingerprint() == example("article").fingerprint()
    pair = corpus.pairs["train"][0]
    others = [example("article", split="test"), Corpus()]
    for field in dataclasses.fields(SummarizationPair):
        other = Corpus()
        other.pairs["train"].append(dataclasses.replace(pair, **{field.name: "changed"}))
        others.append(other)
    two, reversed_two = Corpus(), Corpus()
    two.pairs["train"] += [pair, dataclasses.replace(pair, article="b")]
    reversed_two.pairs["train"] += two.pairs["train"][::-1]
    prints = [corpus.fingerprint(), *(other.fingerprint() for other in [*others, two, reversed_two])]
    assert len(set(prints)) == len(prints) == 9


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def harvests(monkeypatch: pytest.MonkeyPatch) -> list[Corpus]:
    """Puts a corpus of a few pairs in place of the environment's; holds one entry for each time it was read."""
    done: list[Corpus] = []

    def small() -> Corpus:
        packages = ("numpy", "scipy", VALIDATION, TEST)
        done.append(build_corpus(docstring(package, text(f"É apples of {package}")) for package in packages))
        return done[-1]

    monkeypatch.setattr(docstring_corpus, "read_corpus", small)
    return done


def test_the_cache_is_where_it_is_told(harvests: list[Corpus], own_cache: Path) -> None:
    """Pairs lie below the folder that PEFTBENCH_CACHE names, one file a split, with their fingerprint."""
    paths, fingerprint = cache_pair_files()
    assert set(paths) == set(SPLITS)
    assert all(path.is_file() and (own_cache / "peftbench") in path.parents for path in paths.values())
    assert fingerprint == harvests[0].fingerprint()


def test_a_second_call_reads_nothing_again(
    harvests: list[Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment is harvested once for each cache, and what is cached is the same."""
    first = cache_pair_files()
    assert cache_pair_files() == first
    assert len(harvests) == 1
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path / "another"))
    assert cache_pair_files()[1] == first[1]
    assert len(harvests) == 2


def test_another_environment_has_another_corpus(harvests: list[Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a version of what is read changes, the cache of the old one is not taken for it."""
    before, paths = environment_key(), cache_pair_files()[0]
    monkeypatch.setattr("peftbench.data.docstring_corpus.metadata.version", lambda name: "0.0.0")
    assert environment_key() != before
    assert cache_pair_files()[0] != paths
    assert len(harvests) == 2


def test_a_harvest_that_was_cut_off_is_done_again(harvests: list[Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    """Files without their fingerprint, as an interrupt leaves them, are not taken for a corpus."""
    paths, fingerprint = cache_pair_files()
    paths["test"].with_name("fingerprint").unlink()
    paths["test"].write_text("", encoding="utf-8")
    assert cache_pair_files() == (paths, fingerprint)
    assert len(harvests) == 2
    assert paths["test"].read_text(encoding="utf-8")


def test_the_source_gives_the_pairs(harvests: list[Corpus]) -> None:
    """The docstrings source has the corpus's pairs in order, and its fingerprint as identity."""
    source = Docstrings()
    for split in SPLITS:
        dataset = source.load(split)
        pairs = harvests[0].pairs[split]
        assert pairs
        assert list(dataset["article"]) == [pair.article for pair in pairs]
        assert list(dataset["summary"]) == [pair.summary for pair in pairs]
        assert list(dataset["id"]) == [pair.location for pair in pairs]
    assert source.fingerprint() == harvests[0].fingerprint()


def test_a_cache_that_cannot_be_written(
    harvests: list[Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache below a file is told in one sentence before anything is read."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(OutputError, match="cannot write"):
        cache_pair_files()
    assert not harvests


# --- this environment ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_this_environment_makes_a_corpus() -> None:
    """What is installed here gives thousands of pairs, both held-out splits, and no text of theirs in training."""
    corpus = read_corpus()
    assert len(corpus.pairs["train"]) > 10_000
    trained = {normalize_text(part) for pair in corpus.pairs["train"] for part in (pair.article, pair.summary)}
    for split in ("validation", "test"):
        held_out = corpus.pairs[split]
        assert len(held_out) > 100
        assert {pair.package for pair in held_out} == {
            name for name, place in HELD_OUT_PACKAGES.items() if place == split
        }
        assert not [pair for pair in held_out if {normalize_text(pair.article), normalize_text(pair.summary)} & trained]
    assert not {pair.package for pair in corpus.pairs["train"]} & set(HELD_OUT_PACKAGES)
    assert len({normalize_text(pair.article) for pair in corpus.pairs["train"]}) == len(corpus.pairs["train"])
