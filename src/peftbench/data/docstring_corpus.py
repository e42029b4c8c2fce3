"""The offline default corpus: write a docstring's summary line from the rest of the docstring.

The text is the Python source of the standard library and of the distributions in :data:`CORPUS_DISTRIBUTIONS`, which
come with peftbench. The corpus is split by distribution, so no sentence of a held-out package is trained on. Text that
a held-out package shares with a training package (a copied docstring, the same summary line) is dropped from the
held-out split.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from tqdm.auto import tqdm

from peftbench.common.filesystem import cache_dir, write_atomically, write_error
from peftbench.data.cache_usage import DOCSTRINGS_PREFIX
from peftbench.data.docstring_parser import (
    Docstring,
    SummarizationPair,
    build_pair,
    extract_docstrings,
    list_source_files,
    normalize_text,
)
from peftbench.errors import DataNotFoundError

DISTRIBUTION = "peftbench"
CORPUS_DISTRIBUTIONS: tuple[str, ...] = (
    "absl-py",
    "accelerate",
    "altair",
    "annotated-doc",
    "annotated-types",
    "anyio",
    "attrs",
    "certifi",
    "charset-normalizer",
    "click",
    "cloudpickle",
    "datasets",
    "defusedxml",
    "dill",
    "evaluate",
    "filelock",
    "fsspec",
    "h11",
    "hf-xet",
    "httpcore2",
    "httpx2",
    "huggingface-hub",
    "idna",
    "jinja2",
    "joblib",
    "jsonschema",
    "jsonschema-specifications",
    "markdown-it-py",
    "markupsafe",
    "mdurl",
    "mpmath",
    "multiprocess",
    "narwhals",
    "networkx",
    "nltk",
    "numpy",
    "nvidia-ml-py",
    "omegaconf",
    "packaging",
    "pandas",
    "peft",
    "platformdirs",
    "psutil",
    "pyarrow",
    "pydantic",
    "pydantic-core",
    "pygments",
    "python-dateutil",
    "pyyaml",
    "referencing",
    "regex",
    "requests",
    "rich",
    "rouge-score",
    "rpds-py",
    "safetensors",
    "scipy",
    "setuptools",
    "shellingham",
    "six",
    "sympy",
    "tabulate",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "truststore",
    "typer",
    "typing-extensions",
    "typing-inspection",
    "tzdata",
    "urllib3",
    "vl-convert-python",
    "xxhash",
)
"""Distributions that the corpus is read from, by normalized name (PEP 503), sorted.

The list is fixed: it does not follow peftbench's requirements, so a new dependency leaves the corpus as it is. It has
no distribution that only DeepSpeed or bitsandbytes needs, and none that some platform lacks, so the corpus is the same
with and without them.
"""

# Self-contained libraries of different kinds, installed on every platform. All others are in the training split.
HELD_OUT_PACKAGES = {"nltk": "validation", "networkx": "test"}
SPLITS = ("train", "validation", "test")
_CACHE_VERSION = 2  # part of the cache's name: increase it when the rules here or in docstring_parser.py change


@dataclass
class Corpus:
    """Distinct docstrings by split: full ``documents`` for pretraining, ``pairs`` for fine-tuning."""

    documents: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    pairs: dict[str, list[SummarizationPair]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    def fingerprint(self) -> str:
        """Return the hash of every pair of every split, in order (BLAKE2b, 16 bytes, hexadecimal)."""
        digest = hashlib.blake2b(digest_size=16)
        for split in SPLITS:
            for example in self.pairs[split]:
                digest.update(json.dumps([split, *asdict(example).values()]).encode())
        return digest.hexdigest()


def build_corpus(docstrings: Iterable[Docstring]) -> Corpus:
    """Split by package and drop duplicates; text in both a training and a held-out package stays in training."""
    corpus = Corpus()
    texts: set[str] = set()
    parts: set[str] = set()  # summary lines and bodies
    ordered = sorted(docstrings, key=lambda d: SPLITS.index(HELD_OUT_PACKAGES.get(d.package, "train")))
    trained_parts: frozenset[str] = frozenset()
    for docstring in ordered:
        split = HELD_OUT_PACKAGES.get(docstring.package, "train")
        if split != "train" and not trained_parts:
            trained_parts = frozenset(parts)
        summary, _, body = docstring.text.partition("\n")
        keys = {normalize_text(summary), normalize_text(body)} - {""}
        text = normalize_text(docstring.text)
        if text in texts or keys & trained_parts:
            continue
        texts.add(text)
        example = build_pair(docstring)
        if example and normalize_text(body) not in parts:
            corpus.pairs[split].append(example)
        corpus.documents[split].append(docstring.text)
        parts |= keys
    return corpus


def installed_distributions() -> dict[str, str]:
    """Return the installed version of each distribution of the corpus.

    A missing distribution is an error: skipping it would change the training examples and their fingerprint, and the
    run would not be comparable with others.

    Raises:
        DataNotFoundError: a distribution is not installed; the message has the pip command.
    """
    versions: dict[str, str] = {}
    missing: list[str] = []
    for name in CORPUS_DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise DataNotFoundError(
            f"the docstring corpus needs {'a package' if len(missing) == 1 else 'packages'} that "
            f"{'is' if len(missing) == 1 else 'are'} not installed: {', '.join(missing)}",
            f"run: pip install -c constraints.txt {' '.join(missing)}",
        )
    return versions


def read_corpus() -> Corpus:
    """Read the corpus from this environment (about 20 s on 2 cores), with a progress bar on a terminal."""
    files = list_source_files(installed_distributions())
    workers = min(8, os.cpu_count() or 1)
    progress = tqdm(
        extract_docstrings(files, workers), total=len(files), desc="reading docstrings", unit="file", disable=None
    )
    return build_corpus(docstring for docstrings in progress for docstring in docstrings)


def environment_key() -> str:
    """Return the name of this environment's corpus: a hash of the interpreter's and the distributions' versions."""
    versions = [f"{name}=={version}" for name, version in installed_distributions().items()]
    text = json.dumps([_CACHE_VERSION, platform.python_version(), HELD_OUT_PACKAGES, versions])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def cache_pair_files() -> tuple[dict[str, Path], str]:
    """Return the paths of the pairs (JSON lines) by split, and their fingerprint; cached per environment.

    Raises:
        DataNotFoundError: a distribution of the corpus is not installed.
        OutputError: the cache cannot be written.
    """
    folder = cache_dir() / f"{DOCSTRINGS_PREFIX}{environment_key()}"
    paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
    fingerprint = folder / "fingerprint"
    if fingerprint.exists():  # written last, so the cache is complete; a read-only cache works too
        return paths, fingerprint.read_text(encoding="utf-8")
    lock = FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise write_error(folder, error) from error
    with lock:
        if not fingerprint.exists():
            corpus = read_corpus()
            for split, path in paths.items():
                lines = (json.dumps(asdict(example), ensure_ascii=False) for example in corpus.pairs[split])
                write_atomically(path, "\n".join(lines) + "\n")
            write_atomically(fingerprint, corpus.fingerprint())
    return paths, fingerprint.read_text(encoding="utf-8")


class CorpusPair(NamedTuple):
    """A docstring of the corpus, with its place."""

    package: str
    location: str
    text: str
    """Summary line and body."""


def read_pairs(split: str) -> Iterator[CorpusPair]:
    """Yield the docstrings of a split that have a summary line and a body.

    Raises:
        DataNotFoundError, OutputError: as in :func:`cache_pair_files`.
    """
    with cache_pair_files()[0][split].open(encoding="utf-8") as file:
        for line in file:
            values = json.loads(line)
            yield CorpusPair(values["package"], values["location"], f"{values['summary']}\n\n{values['article']}")
