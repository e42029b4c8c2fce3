"""The cache of examples: its key is the content, so a replaced file never gives old rows."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow
import pytest
from pyarrow import parquet

from peftbench.data.base import Source
from peftbench.data.hub import Hub
from peftbench.data.sources import Files
from peftbench.errors import DataError, DiskFullError, OutputError
from peftbench.tasks.summarization import Summarization
from tests.helpers.disks import mount_tmpfs
from tests.helpers.summaries import load_summaries, summary_encoder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SAME_TIME = (10**9, 10**9)


def write(path: Path, color: str) -> None:
    """Write eight examples about ships of a color, in the format of the suffix; all have one size and time."""
    rows = [{"article": f"The {color} ship number {i} came in.", "highlights": f"{color} ship {i}"} for i in range(8)]
    path.parent.mkdir(exist_ok=True, parents=True)
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        is_csv = name.endswith(".csv")
        lines = [",".join(row.values()) for row in rows] if is_csv else [json.dumps(row) for row in rows]
        text = "\n".join([*(["article,highlights"] if is_csv else []), *lines]) + "\n"
        path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    os.utime(path, SAME_TIME)


def from_file(path: Path) -> Source:
    """Return the source of a file in each split."""
    name = str(path)
    return Files(train=name, validation=name, test=name)


def from_folder(path: Path) -> Source:
    """Return the source of the folder of a file."""
    return Hub(path=str(path.parent), config=None, id=None)


def load(source: Source, split: str = "train") -> Dataset:
    """Return the examples of a split."""
    return load_summaries(source, split, summary="highlights")


CASES: list[tuple[Callable[[Path], Source], str, str]] = [
    *((from_file, f"rows{suffix}", split) for suffix in (".jsonl", ".csv", ".parquet") for split in ("train", "test")),
    (from_file, "rows.json", "validation"),
    *((from_folder, f"{split}{suffix}", split) for suffix, split in ((".jsonl", "train"), (".csv", "test"))),
    (from_folder, "train.parquet", "train"),
    (from_folder, "train.csv.gz", "train"),
    (from_folder, "train.jsonl.gz", "train"),
]


@pytest.mark.parametrize(("source_of", "name", "split"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_replaced_file_of_the_same_time_gives_the_new_rows(
    source_of: Callable[[Path], Source], name: str, split: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """This holds for the rows and for their encoding."""
    encoder = summary_encoder(tokenizer, 96)
    path, fingerprints = tmp_path / "data" / name, set()
    for color in ("red", "tan", "red"):
        write(path, color)
        dataset = load(source_of(path), split)
        assert list(dataset["summary"]) == [f"{color} ship {i}" for i in range(8)]
        encoded, _ = encoder.encode_split(dataset.shuffle(seed=0).select(range(4)), split, "drop")
        for row in encoded:
            assert encoder.decode(row["input_ids"][slice(*row["label_spans"])]) == row["summary"]
            assert row["summary"].startswith(color)
        fingerprints.add(dataset._fingerprint)
    assert len(fingerprints) == 2


def test_equal_content_is_read_once(tmp_path: Path, own_cache: Path) -> None:
    """A copy of a file under another name and time has the same cache."""
    write(tmp_path / "one.jsonl", "red")
    write(tmp_path / "two.jsonl", "red")
    os.utime(tmp_path / "two.jsonl")
    first, second = load(from_file(tmp_path / "one.jsonl")), load(from_file(tmp_path / "two.jsonl"), "test")
    assert first._fingerprint == second._fingerprint
    assert first.cache_files == second.cache_files
    assert len(list(own_cache.rglob("examples.arrow"))) == 1


def test_other_columns_or_format_are_read_again(tmp_path: Path) -> None:
    """The key has the used columns and the format, as well as the bytes."""
    write(tmp_path / "rows.jsonl", "red")
    source = Files(train=str(tmp_path / "rows.jsonl"))
    normal = load(source)
    swapped = load_summaries(source, article="highlights", summary="article")
    assert normal[0]["article"] == swapped[0]["summary"]
    assert normal._fingerprint != swapped._fingerprint


def test_every_process_gets_the_same_examples(tmp_path: Path, own_cache: Path) -> None:
    """Processes that read a file at once agree on the rows and on the key of everything that is derived from them."""
    write(tmp_path / "rows.jsonl", "red")
    code = (
        "import sys; from peftbench.data.readers.rows import Columns; from peftbench.data.sources import Files; "
        "columns = Columns({'article': 'article', 'summary': 'highlights'}); "
        "d = Files(train=sys.argv[1]).load('train', columns); "
        "print(d._fingerprint, d.shuffle(seed=3)._fingerprint, d[7])"
    )
    environment = os.environ | {"HF_DATASETS_CACHE": str(own_cache / "shared")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "rows.jsonl")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0] != ""
    assert [errors for _, errors in results] == ["", ""]  # no progress bar without a terminal
    assert len([path for path in own_cache.rglob("*") if "examples.arrow" in path.name]) == 1


def test_file_in_the_cache_is_not_replaced_by_an_equal_one(tmp_path: Path, own_cache: Path) -> None:
    """A process that finishes later keeps the file that others may have mapped."""
    from peftbench.data.example_cache import load_cached_examples

    example, columns = {"id": "0", "article": "a", "summary": "s"}, Summarization().select_columns(None)

    def read_while_another_stores() -> list[dict[str, str]]:
        load_cached_examples(["key"], columns, lambda: [example], "reading")
        (stored,) = own_cache.rglob("examples.arrow")
        inodes.append(stored.stat().st_ino)
        return [example]

    inodes: list[int] = []
    dataset = load_cached_examples(["key"], columns, read_while_another_stores, "reading")
    files = [path for path in own_cache.rglob("*") if path.is_file()]
    assert [file.stat().st_ino for file in files] == inodes
    assert list(dataset) == [example]


def test_damaged_cache_is_written_again(tmp_path: Path, own_cache: Path) -> None:
    """A file of the cache that cannot be read does not stop the run."""
    write(tmp_path / "rows.jsonl", "red")
    load(from_file(tmp_path / "rows.jsonl"))
    (cached,) = own_cache.rglob("examples.arrow")
    cached.write_bytes(b"damaged")
    assert len(load(from_file(tmp_path / "rows.jsonl"))) == 8


def test_refused_file_leaves_nothing_in_the_cache(tmp_path: Path, own_cache: Path) -> None:
    """The examples before the fault are not kept."""
    (tmp_path / "rows.jsonl").write_text('{"article": "a", "highlights": "b"}\n' * 3000 + "{", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(DataError, match="line 3001 ends before its object is complete"):
            load(from_file(tmp_path / "rows.jsonl"))
    assert [path for path in own_cache.rglob("*") if path.is_file()] == []


def test_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise new rows would be stored under the key of the old ones."""
    from peftbench.data import local_files

    path = tmp_path / "rows.jsonl"
    write(path, "red")
    hash_content = local_files.hash_content

    def hash_then_replace(hashed: Path) -> str:
        digest = hash_content(hashed)
        write(path, "tan")
        return digest

    monkeypatch.setattr(local_files, "hash_content", hash_then_replace)
    with pytest.raises(DataError, match=r"rows\.jsonl changed while it was read; run again"):
        load(from_file(path))
    monkeypatch.undo()
    assert load(from_file(path))[0]["summary"] == "tan ship 0"


@pytest.mark.parametrize(
    ("source_of", "name"), [(from_file, "train.jsonl"), (from_folder, "train.jsonl"), (from_folder, "train.csv.gz")]
)
def test_cache_that_cannot_be_written_is_the_named_cause(
    source_of: Callable[[Path], Source], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the cache and its variables, not the data set."""
    import datasets

    write(tmp_path / "data" / name, "red")
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(OutputError, match=r"cannot write .*file/cache.*: Not a directory; set HF_HOME or HF_DATASETS"):
        load(source_of(tmp_path / "data" / name))


@pytest.mark.parametrize(
    ("options", "kind", "cause"),
    [("size=4k", DiskFullError, "the disk is full"), ("ro", OutputError, "Read-only file system")],
)
def test_full_or_read_only_cache_is_the_named_cause(
    options: str, kind: type[OutputError], cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No part of a file stays on the disk."""
    import datasets

    write(tmp_path / "rows.jsonl", "red " * 2000)
    with mount_tmpfs(tmp_path / "disk", options) as disk:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", disk)
        with pytest.raises(kind, match=f"{cause}.*; set HF_HOME or HF_DATASETS_CACHE"):
            load(from_file(tmp_path / "rows.jsonl"))
        assert [path for path in disk.rglob("*") if path.is_file()] == []
