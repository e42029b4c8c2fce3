"""The offline corpus: split by package, no held-out text in training, cached per environment."""

from __future__ import annotations

import dataclasses
import hashlib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from peftbench.data import docstring_corpus
from peftbench.data.docstring_corpus import (
    CORPUS_DISTRIBUTIONS,
    HELD_OUT_PACKAGES,
    SPLITS,
    Corpus,
    build_corpus,
    cache_pair_files,
    environment_key,
    installed_distributions,
    read_corpus,
)
from peftbench.data.docstring_parser import Docstring, SummarizationPair, normalize_text
from peftbench.data.sources import Docstrings
from peftbench.errors import DataNotFoundError, OutputError
from tests.helpers.summaries import load_summaries

VALIDATION, TEST = (
    next(package for package, split in HELD_OUT_PACKAGES.items() if split == held_out)
    for held_out in ("validation", "test")
)


def text(topic: str, body: str | None = None) -> str:
    """Return a docstring that is a valid pair; by default two of them share no text."""
    return f"Say something short about {topic}.\n\n" + (body or f"The body describes {topic} at length. " * 6)


def docstring(package: str, content: str) -> Docstring:
    """Return a docstring of ``package``."""
    return Docstring(package, f"{package}.py:{len(content)}", content)


def summaries(corpus: Corpus) -> dict[str, list[str]]:
    """Return the topics of each split's pairs."""
    start = len("Say something short about ")
    return {split: [pair.summary[start:-1] for pair in corpus.pairs[split]] for split in SPLITS}


def test_splits_by_package() -> None:
    """Held-out packages go to their split only, all others to training, in any order of reading."""
    docstrings = [docstring(package, text(f"apples of {package}")) for package in (TEST, "numpy", VALIDATION, "python")]
    expected = {
        "train": ["apples of numpy", "apples of python"],
        "validation": [f"apples of {VALIDATION}"],
        "test": [f"apples of {TEST}"],
    }
    assert summaries(build_corpus(docstrings)) == expected
    corpus = build_corpus(reversed(docstrings))
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
        text("plums", body="The body describes pears at length. " * 6),
    ],
    ids=["whole", "whole except case and spaces", "summary", "body"],
)
def test_shared_text_stays_in_training_only(package: str, copied: str) -> None:
    """A copied docstring, summary line or body is dropped from the held-out split: pairs and documents."""
    corpus = build_corpus(
        [docstring(package, copied), docstring(package, text("figs")), docstring("numpy", text("pears"))]
    )
    split = HELD_OUT_PACKAGES[package]
    assert summaries(corpus)["train"] == ["pears"]
    assert summaries(corpus)[split] == ["figs"]
    assert corpus.documents[split] == [text("figs")]


def test_summary_in_training_without_a_body_is_dropped_elsewhere() -> None:
    """A summary line that training has without a body is dropped from the held-out split."""
    summary_only = "Say something short about pears."
    corpus = build_corpus(
        [docstring("numpy", summary_only), docstring(TEST, text("pears")), docstring(TEST, text("figs"))]
    )
    assert corpus.documents["train"] == [summary_only]
    assert summaries(corpus)["test"] == ["figs"]


def test_copies_within_a_split_count_once() -> None:
    """A docstring in several packages is one document and one pair; one body is in one pair."""
    corpus = build_corpus(
        [
            docstring("numpy", text("pears")),
            docstring("scipy", text("pears")),
            docstring("scipy", text("plums", body="The body describes pears at length. " * 6)),
        ]
    )
    assert summaries(corpus)["train"] == ["pears"]
    assert len(corpus.documents["train"]) == 2


def example(article: str, split: str = "train") -> Corpus:
    """Return a corpus of one pair."""
    corpus = Corpus()
    corpus.pairs[split].append(SummarizationPair("package", "where", article, "summary"))
    return corpus


def test_fingerprint_depends_on_every_pair() -> None:
    """Any field, the split or the order of pairs changes the fingerprint; documents do not."""
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
    fingerprints = [corpus.fingerprint(), *(other.fingerprint() for other in [*others, two, reversed_two])]
    assert len(set(fingerprints)) == len(fingerprints) == 9


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def read_corpora(monkeypatch: pytest.MonkeyPatch) -> list[Corpus]:
    """Replace the environment's corpus by a few pairs; the list has one entry per read."""
    corpora: list[Corpus] = []

    def build_small_corpus() -> Corpus:
        packages = ("numpy", "scipy", VALIDATION, TEST)
        corpora.append(build_corpus(docstring(package, text(f"É apples of {package}")) for package in packages))
        return corpora[-1]

    monkeypatch.setattr(docstring_corpus, "read_corpus", build_small_corpus)
    return corpora


def test_cache_is_in_the_cache_folder(read_corpora: list[Corpus], own_cache: Path) -> None:
    """Pairs are below $PEFTBENCH_CACHE, one file per split, with their fingerprint."""
    paths, fingerprint = cache_pair_files()
    assert set(paths) == set(SPLITS)
    assert all(path.is_file() and (own_cache / "peftbench") in path.parents for path in paths.values())
    assert fingerprint == read_corpora[0].fingerprint()


def test_second_call_reads_the_cache(
    read_corpora: list[Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment is read once per cache, and the cached content is the same."""
    first = cache_pair_files()
    assert cache_pair_files() == first
    assert len(read_corpora) == 1
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path / "another"))
    assert cache_pair_files()[1] == first[1]
    assert len(read_corpora) == 2


def test_another_environment_has_its_own_cache(read_corpora: list[Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of a distribution uses another cache folder."""
    before, paths = environment_key(), cache_pair_files()[0]
    monkeypatch.setattr("peftbench.data.docstring_corpus.metadata.version", lambda name: "0.0.0")
    assert environment_key() != before
    assert cache_pair_files()[0] != paths
    assert len(read_corpora) == 2


def test_interrupted_read_is_repeated(read_corpora: list[Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache without its fingerprint, as after an interrupt, is not used."""
    paths, fingerprint = cache_pair_files()
    paths["test"].with_name("fingerprint").unlink()
    paths["test"].write_text("", encoding="utf-8")
    assert cache_pair_files() == (paths, fingerprint)
    assert len(read_corpora) == 2
    assert paths["test"].read_text(encoding="utf-8")


def test_source_returns_the_pairs(read_corpora: list[Corpus]) -> None:
    """The docstrings source has the corpus's pairs in order, and its fingerprint."""
    source = Docstrings()
    for split in SPLITS:
        dataset = load_summaries(source, split)
        pairs = read_corpora[0].pairs[split]
        assert pairs
        assert list(dataset["article"]) == [pair.article for pair in pairs]
        assert list(dataset["summary"]) == [pair.summary for pair in pairs]
        assert list(dataset["id"]) == [pair.location for pair in pairs]
    assert source.fingerprint() == read_corpora[0].fingerprint()


def test_unwritable_cache(read_corpora: list[Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder below a file is an error before anything is read."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(OutputError, match="cannot write"):
        cache_pair_files()
    assert not read_corpora


# --- which distributions ---------------------------------------------------------------------------------------------


def required_distributions(name: str, environment: dict[str, str], without: tuple[str, ...] = ()) -> set[str]:
    """Return what installing ``name`` installs in ``environment``, itself included, by normalized name.

    Requirements of installed distributions are followed; those named in ``without`` are left out.
    """
    installed: set[tuple[str, str]] = set()
    pending = [(name, "")]
    while pending:
        distribution, extra = pending.pop()
        if (distribution, extra) in installed or distribution in without:
            continue
        installed.add((distribution, extra))
        try:
            lines = metadata.requires(distribution) or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra}):
                pending += [(canonicalize_name(requirement.name), each) for each in ("", *requirement.extras)]
    return {distribution for distribution, _ in installed}


def test_list_of_distributions_is_fixed() -> None:
    """The demo's committed records depend on this list."""
    assert list(CORPUS_DISTRIBUTIONS) == sorted(set(CORPUS_DISTRIBUTIONS))
    assert set(HELD_OUT_PACKAGES) <= set(CORPUS_DISTRIBUTIONS)
    assert hashlib.blake2b(" ".join(CORPUS_DISTRIBUTIONS).encode(), digest_size=8).hexdigest() == "46d93b87c6fcadad"


def test_corpus_does_not_depend_on_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adding a dependency, or moving one to an extra, does not change the corpus's distributions or its cache."""
    before, key = installed_distributions(), environment_key()
    for requirements in (["new-dependency"], ['altair; extra == "report"'], None):
        monkeypatch.setattr(metadata.PathDistribution, "requires", requirements)
        assert metadata.requires("peftbench") == requirements
        assert (installed_distributions(), environment_key()) == (before, key)


@pytest.mark.parametrize("missing", [("setuptools",), ("nltk", "setuptools")])
def test_missing_distribution_is_named_with_its_pip_command(
    missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listed distribution that is not installed is an error, since skipping it would change the corpus."""
    version = metadata.version

    def without_missing(name: str) -> str:
        if name in missing:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_missing)
    with pytest.raises(DataNotFoundError, match=f"run: pip install -c constraints.txt {' '.join(missing)}$"):
        cache_pair_files()


OPTIONAL_REQUIREMENTS = ("bitsandbytes", "deepspeed")


@pytest.mark.parametrize(
    "system", [("Linux", "linux", "posix"), ("Darwin", "darwin", "posix"), ("Windows", "win32", "nt")]
)
def test_corpus_needs_neither_deepspeed_nor_bitsandbytes(system: tuple[str, str, str]) -> None:
    """Every distribution of the corpus is installed on each platform by the other requirements alone."""
    environment = dict(zip(("platform_system", "sys_platform", "os_name"), system, strict=True))
    installed = required_distributions("peftbench", environment, without=OPTIONAL_REQUIREMENTS)
    assert "torch" in installed
    assert not installed & set(OPTIONAL_REQUIREMENTS)
    assert set(CORPUS_DISTRIBUTIONS) <= installed


# --- this environment ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_corpus_of_this_environment() -> None:
    """This environment gives thousands of pairs in all splits, and no held-out text in training."""
    corpus = read_corpus()
    assert len(corpus.pairs["train"]) > 10_000
    training_texts = {normalize_text(part) for pair in corpus.pairs["train"] for part in (pair.article, pair.summary)}
    for split in ("validation", "test"):
        held_out = corpus.pairs[split]
        assert len(held_out) > 100
        assert {pair.package for pair in held_out} == {
            package for package, package_split in HELD_OUT_PACKAGES.items() if package_split == split
        }
        assert not [
            pair for pair in held_out if {normalize_text(pair.article), normalize_text(pair.summary)} & training_texts
        ]
    assert not {pair.package for pair in corpus.pairs["train"]} & set(HELD_OUT_PACKAGES)
    assert len({normalize_text(pair.article) for pair in corpus.pairs["train"]}) == len(corpus.pairs["train"])
