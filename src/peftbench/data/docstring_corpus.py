"""The offline default: summary lines to be written from the rest of their docstrings.

The text is what every installation of peftbench has on its disk: the standard library and peftbench's own run-time
dependencies. It is split by distribution, so that no sentence of a held-out package is trained on, and what a held-out
package shares with a training one (a copied docstring, the same summary line) is dropped from the held-out side.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from filelock import FileLock
from tqdm.auto import tqdm

from peftbench.common.filesystem import cache_dir, write_atomically, write_error
from peftbench.data.docstring_parser import (
    Docstring,
    SummarizationPair,
    build_pair,
    extract_docstrings,
    list_source_files,
    normalize_text,
    resolve_dependencies,
)

DISTRIBUTION = "peftbench"
# Self-contained libraries of different kinds, present under every platform's markers; all others are trained on.
HELD_OUT_PACKAGES = {"nltk": "validation", "networkx": "test"}
SPLITS = ("train", "validation", "test")
_CACHE_VERSION = 1  # part of the cache's name: raise it when the rules below or in harvest.py change


@dataclass
class Corpus:
    """Distinct docstrings by split: whole ``documents`` for pretraining, ``pairs`` for fine-tuning."""

    documents: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    pairs: dict[str, list[SummarizationPair]] = field(default_factory=lambda: {split: [] for split in SPLITS})

    def fingerprint(self) -> str:
        """Hash of every pair of every split, in order (BLAKE2b, 16 bytes, hexadecimal)."""
        digest = hashlib.blake2b(digest_size=16)
        for split in SPLITS:
            for example in self.pairs[split]:
                digest.update(json.dumps([split, *asdict(example).values()]).encode())
        return digest.hexdigest()


def build_corpus(docstrings: Iterable[Docstring]) -> Corpus:
    """Split by package and drop duplicates; the training side keeps what both sides have."""
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


def read_corpus() -> Corpus:
    """Harvest this environment (about 20 s on 2 cores), with a progress bar on a terminal."""
    files = len(list_source_files(resolve_dependencies(DISTRIBUTION)))
    workers = min(8, os.cpu_count() or 1)
    bar = tqdm(
        extract_docstrings(DISTRIBUTION, workers), total=files, desc="reading docstrings", unit="file", disable=None
    )
    return build_corpus(docstring for found in bar for docstring in found)


def environment_key() -> str:
    """Names the corpus before it is read: the interpreter and the exact versions it is read from."""
    versions = [f"{name}=={metadata.version(name)}" for name in resolve_dependencies(DISTRIBUTION)]
    text = json.dumps([_CACHE_VERSION, platform.python_version(), HELD_OUT_PACKAGES, versions])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def cache_pair_files() -> tuple[dict[str, Path], str]:
    """Paths of the pairs as JSON lines, by split, and their fingerprint; harvested once an environment, then cached."""
    folder = cache_dir() / f"docstrings-{environment_key()}"
    paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
    fingerprint = folder / "fingerprint"
    if fingerprint.exists():  # complete, since it is written last; a cache that cannot be written can be read
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
