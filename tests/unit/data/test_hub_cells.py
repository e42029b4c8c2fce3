"""Cells of data sets in a folder of the Hub's layout: the same rules as for files, however they are read."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow
import pytest
from pyarrow import parquet

from peftbench.data.hub import Hub
from peftbench.errors import (
    DataError,
    DataNotFoundError,
    DiskFullError,
    EmptySplitError,
    HubUnreachableError,
    OutputError,
    PeftbenchError,
)
from tests.helpers.summaries import load_summaries, select_columns

if TYPE_CHECKING:
    from datasets import Dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an empty folder for a data set."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def load(source: Hub) -> Dataset:
    """Return the training split."""
    return load_summaries(source, summary="highlights")


HEADER = "id,article,highlights\n"
CELLS = "000,00500,NA\n001,1.10,null\n002,None,nan\n"


def write_csv(folder: Path) -> None:
    """Write a plain CSV file, which peftbench reads itself."""
    (folder / "train.csv").write_text(HEADER + CELLS, encoding="utf-8")


def write_compressed_csv(folder: Path) -> None:
    """Write a compressed CSV file, which ``datasets`` reads."""
    (folder / "train.csv.gz").write_bytes(gzip.compress((HEADER + CELLS).encode()))


def write_tab_separated(folder: Path) -> None:
    """Write a file separated by tabs, which ``datasets`` reads."""
    (folder / "train.tsv").write_text((HEADER + CELLS).replace(",", "\t"), encoding="utf-8")


def write_csv_with_options(folder: Path) -> None:
    """Write a file whose separator is in the header of the card."""
    (folder / "rows.csv").write_text((HEADER + CELLS).replace(",", ";"), encoding="utf-8")
    card = "---\nconfigs:\n- config_name: default\n  data_files: rows.csv\n  sep: ';'\n---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_parquet(folder: Path) -> None:
    """Write bytes in two shards."""
    rows = [line.split(",") for line in CELLS.split()]
    for index, part in enumerate((rows[:1], rows[1:])):
        columns = {
            name: pyarrow.array([row[place] for row in part]).cast(pyarrow.binary())
            for place, name in enumerate(HEADER.strip().split(","))
        }
        parquet.write_table(pyarrow.table(columns), folder / f"train-0000{index}-of-00002.parquet")


@pytest.mark.parametrize(
    "write", [write_csv, write_compressed_csv, write_tab_separated, write_csv_with_options, write_parquet]
)
def test_cells_are_text_as_written(write: Callable[[Path], None], folder: Path) -> None:
    """No number is read from text and no text is taken for a missing value, whichever library reads the file."""
    write(folder)
    rows = load(Hub(path=str(folder), config=None))
    assert [(row["id"], row["article"], row["summary"]) for row in rows] == [
        tuple(line.split(",")) for line in CELLS.split()
    ]


@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ('{"article": "a", "highlights": 1.5}', "highlights"),
        ('{"article": "a", "highlights": ["b"]}', "highlights"),
        ('{"article": "a", "highlights": null}', "has no highlights"),
        ('{"article": ,, "highlights": "b"}', "cannot be read"),
    ],
)
def test_cell_that_is_not_text_is_refused(row: str, fault: str, is_compressed: bool, folder: Path) -> None:
    """The error is of the same class for a file that peftbench reads and for one that ``datasets`` reads."""
    content = (row + "\n").encode()
    name = "train.jsonl.gz" if is_compressed else "train.jsonl"
    (folder / name).write_bytes(gzip.compress(content) if is_compressed else content)
    with pytest.raises(DataError, match=fault) as error:
        load(Hub(path=str(folder), config=None, id=None))
    assert type(error.value) is DataError
    assert str(error.value).isprintable()


def test_shard_is_named_with_its_line(folder: Path) -> None:
    """Rows are numbered over all shards; a fault has the shard's path and line."""
    for index, text in enumerate(("a", "b")):
        line = f'{{"article": "{text}", "highlights": "s"}}\n'
        (folder / f"train-0000{index}-of-00002.jsonl").write_text(line, encoding="utf-8")
    source = Hub(path=str(folder), config=None, id=None)
    assert [(row["id"], row["article"]) for row in load(source)] == [("0", "a"), ("1", "b")]
    with (folder / "train-00001-of-00002.jsonl").open("a", encoding="utf-8") as file:
        file.write(",\n")
    with pytest.raises(
        DataError, match=r"train-00001-of-00002\.jsonl cannot be read as json: line 2 has an extra comma"
    ):
        load(source)


def answer_with(dataset: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library ``datasets`` answer as if it had found a data set on the Hub; raise an exception."""
    import datasets

    def answer(*_: object, **__: object) -> object:
        if isinstance(dataset, Exception):
            raise dataset
        return dataset

    monkeypatch.setattr(datasets, "load_dataset_builder", answer)
    monkeypatch.setattr(datasets, "load_dataset", answer)


def test_bytes_of_a_hub_data_set_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules for cells are those of files."""
    from datasets import Dataset

    rows = {"article": [b"\xc3\xa9", b"b"], "highlights": ["NA", "00500"], "id": [1, 2]}
    answer_with(Dataset.from_dict(rows), monkeypatch)
    assert [tuple(row.values()) for row in load(Hub())] == [("1", "é", "NA"), ("2", "b", "00500")]


@pytest.mark.parametrize(
    ("column", "fault"),
    [
        ([1.5, float("nan")], "column 'highlights' of the train split of abisee/cnn_dailymail has type double"),
        ([["a"], ["b"]], "has type list<item: string>, which is not text"),
        ([b"a", b"\xff"], "example 1 of the train split of abisee/cnn_dailymail has bytes that are not UTF-8"),
        (["a", None], "example 1 of the train split of abisee/cnn_dailymail has no highlights"),
    ],
)
def test_cell_of_a_hub_data_set_that_is_not_text_is_refused(
    column: list[object], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has the data set, the row or the type, and the column."""
    from datasets import Dataset

    answer_with(Dataset.from_dict({"article": ["a", "b"], "highlights": column}), monkeypatch)
    with pytest.raises(DataError) as error:
        load(Hub(id=None))
    assert fault in str(error.value)


@pytest.mark.parametrize(
    ("error", "kind", "cause"),
    [
        (
            PermissionError(13, "Permission denied", "/cache/hub"),
            OutputError,
            "cannot write /cache/hub: Permission denied",
        ),
        (NotADirectoryError(20, "Not a directory", "/file/hub"), OutputError, "set HF_HOME or HF_DATASETS_CACHE"),
        (OSError(28, "No space left on device"), DiskFullError, "the disk is full"),
        (ConnectionError("no route"), HubUnreachableError, "the Hub did not answer"),
        (PermissionError(1, "Operation not permitted"), DataNotFoundError, "could not load"),
        (FileNotFoundError("no such data set"), DataNotFoundError, "could not load .*: no such data set"),
        (ValueError('Unknown split "test"'), EmptySplitError, "does not exist: Unknown split"),
        (RuntimeError("first\nsecond"), DataNotFoundError, "could not load .*: first; to use a local copy"),
    ],
    ids=str,
)
def test_each_failure_of_the_hub_has_its_own_cause(
    error: Exception, kind: type[PeftbenchError], cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that cannot be written is not reported as a missing data set or a missing network."""
    answer_with(error, monkeypatch)
    for call in (Hub().fingerprint, lambda: load_summaries(Hub(), "test")):
        with pytest.raises(kind, match=cause) as raised:
            call()
        assert type(raised.value) is kind


@pytest.mark.parametrize("path", ["./none", "/no/such/folder", "a/b/c", "a b", "", "x" * 300, "a\0b"])
@pytest.mark.parametrize("method", ["check", "load", "fingerprint"])
def test_path_that_is_no_name_on_the_hub_is_refused_at_once(
    path: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is not asked."""
    import datasets

    def ask(*_: object, **__: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", ask)
    monkeypatch.setattr(datasets, "load_dataset_builder", ask)
    source = Hub(path=path)
    arguments = () if method == "fingerprint" else ("train", select_columns(source))
    with pytest.raises(DataNotFoundError, match="the folder does not exist, and this is not the name of a data set"):
        getattr(source, method)(*arguments)


def test_broken_link_in_a_folder_is_the_named_cause(folder: Path) -> None:
    """Such a link is left when a snapshot of the Hub's cache is copied without its files."""
    (folder / "train.jsonl").symlink_to("../../blobs/0")
    source = Hub(path=str(folder), config=None)
    with pytest.raises(DataNotFoundError, match=r"train\.jsonl is a link to \.\./\.\./blobs/0, which does not exist"):
        source.check("train", select_columns(source))


def test_missing_split_of_a_folder_is_found_by_the_check(folder: Path) -> None:
    """The error lists the splits that the folder has."""
    write_csv(folder)
    source = Hub(path=str(folder), config=None)
    columns = select_columns(source, summary="highlights")
    source.check("train", columns)
    with pytest.raises(EmptySplitError, match="does not exist: the folder has the splits train"):
        source.check("test", columns)
