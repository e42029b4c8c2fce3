"""Data sources: all return the columns of the task, and each error is one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from peftbench.data.base import Source
from peftbench.data.hub import Hub
from peftbench.data.sources import Files
from peftbench.errors import DataError, DataNotFoundError, EmptySplitError, HubUnreachableError, MissingColumnError
from tests.helpers.summaries import load_summaries

WriteRows = Callable[[str, Sequence[dict[str, Any]]], str]
ROWS = [
    {"key": "a", "article": 'First, with "quotes",\nand a line break.', "summary": "É one", "other": 1},
    {"key": "b", "article": "Second.", "summary": "Two", "other": 2},
]
FORMATS = (".jsonl", ".csv", ".parquet")


def rows_of(source: Source, split: str = "train", **columns: str) -> list[dict[str, str]]:
    """Return all rows of a split, as dictionaries of its id and the task's two columns."""
    dataset = load_summaries(source, split, **columns)
    assert dataset.column_names == ["id", "article", "summary"]
    return [dict(row) for row in dataset]


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", FORMATS)
def test_every_file_format_gives_the_same_rows(ending: str, write_rows: WriteRows) -> None:
    """JSON lines, CSV and Parquet give the same three text columns in order; other columns are dropped."""
    source = Files(train=write_rows(f"rows{ending}", ROWS), id="key")
    assert rows_of(source) == [{"id": row["key"], "article": row["article"], "summary": row["summary"]} for row in ROWS]


@pytest.mark.parametrize("ending", FORMATS)
def test_columns_are_selected_by_the_recipe_s_names(ending: str, write_rows: WriteRows) -> None:
    """This holds even if the recipe swaps the names ``article`` and ``summary``."""
    path = write_rows(f"rows{ending}", [{"summary": "the text", "article": "the summary", "text": "neither"}])
    rows = rows_of(Files(train=path), article="summary", summary="article")
    assert rows == [{"id": "0", "article": "the text", "summary": "the summary"}]


def test_rows_without_an_id_are_numbered(write_rows: WriteRows) -> None:
    """Without an id column, the id is the row's number, counted from 0."""
    assert [row["id"] for row in rows_of(Files(train=write_rows("rows.jsonl", ROWS)))] == ["0", "1"]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_integer_ids_become_text(ending: str, write_rows: WriteRows) -> None:
    """An id may be an integer, with and without renaming."""
    rows = [{"id": number, "article": "text", "summary": "s", "other": number + 5} for number in (1, 2)]
    path = write_rows(f"rows{ending}", rows)
    assert [row["id"] for row in rows_of(Files(train=path, id="id"))] == ["1", "2"]
    assert [row["id"] for row in rows_of(Files(train=path, id="other"))] == ["6", "7"]


def test_unreadable_file_is_refused_with_its_path(tmp_path: Path) -> None:
    """A file whose read fails is a DataError with its path."""
    (tmp_path / "rows.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read"):
        Files(train=str(tmp_path / "rows.jsonl")).fingerprint()


def test_local_copy_of_a_hub_dataset_is_mutable(tmp_path: Path) -> None:
    """A local folder can change; a data set of the Hub is pinned to a commit."""
    assert Hub(path=str(tmp_path)).is_mutable
    assert not Hub().is_mutable


@pytest.mark.parametrize("column", ["article", "summary"])
def test_blank_text_is_refused(column: str, write_rows: WriteRows) -> None:
    """The error has the number of the example whose article or summary is blank."""
    rows = [{"article": "a", "summary": "s"}, {"article": "a", "summary": "s", column: " \n"}]
    with pytest.raises(DataError, match=rf"example 1 \(line 2\) of the train split of .* has no {column}"):
        load_summaries(Files(train=write_rows("rows.jsonl", rows)))


def test_each_split_has_its_own_file(write_rows: WriteRows) -> None:
    """A split's rows come from its file only."""
    splits = ("train", "validation", "test")
    files = {split: write_rows(f"{split}.jsonl", [{"article": split, "summary": "s"}]) for split in splits}
    source = Files(**files)  # type: ignore[arg-type]
    assert [rows_of(source, split)[0]["article"] for split in splits] == list(splits)


def test_changed_file_is_read_again(write_rows: WriteRows) -> None:
    """After a change, the cache is not used and the fingerprint differs."""
    source = Files(train=write_rows("rows.jsonl", [{"article": "old", "summary": "s"}]))
    old_rows, old_fingerprint = rows_of(source), source.fingerprint()
    path = write_rows("rows.jsonl", [{"article": "new", "summary": "s"}])
    os.utime(path, (1, 1))  # older than the first file, like a file restored from a backup
    assert old_rows[0]["article"] == "old"
    assert rows_of(source)[0]["article"] == "new"
    assert source.fingerprint() != old_fingerprint


def test_fingerprint_depends_on_the_content_only(write_rows: WriteRows) -> None:
    """Two copies of a file with different names have the same fingerprint."""
    first, second = (Files(train=write_rows(name, ROWS)) for name in ("one.jsonl", "deep/two.jsonl"))
    assert first.fingerprint() == second.fingerprint()


@pytest.mark.parametrize(
    ("name", "suggestion"), [("artcle", r"did you mean 'article'\?"), ("zzz", "allowed: key, article, summary, other")]
)
@pytest.mark.parametrize("ending", FORMATS)
def test_missing_column_is_refused_with_the_closest_name(
    ending: str, name: str, suggestion: str, write_rows: WriteRows
) -> None:
    """The error has the split, the file, and the closest column name or all of them."""
    source = Files(train=write_rows(f"rows{ending}", ROWS))
    with pytest.raises(
        MissingColumnError, match=rf"train split of .*rows\{ending} has no column '{name}'; {suggestion}"
    ):
        load_summaries(source, article=name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jsonl", ""),
        ("empty.csv", ""),
        ("empty.parquet", ""),
        ("blank.jsonl", "\n\n"),
        ("header.csv", "article,summary\n"),
    ],
)
def test_file_without_examples_is_an_empty_split(name: str, content: str, tmp_path: Path) -> None:
    """An empty file, blank lines, or only a header: the error has the file's name."""
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(EmptySplitError, match=name):
        load_summaries(Files(train=str(tmp_path / name)))


def test_parquet_file_without_rows_is_an_empty_split(write_rows: WriteRows, tmp_path: Path) -> None:
    """The file has columns, and the error has its name."""
    import pandas as pd

    pd.DataFrame({"article": pd.Series([], dtype=str), "summary": pd.Series([], dtype=str)}).to_parquet(
        tmp_path / "none.parquet"
    )
    with pytest.raises(EmptySplitError, match=r"none\.parquet"):
        load_summaries(Files(train=str(tmp_path / "none.parquet")))


def test_split_without_a_file_is_refused_with_its_key(write_rows: WriteRows) -> None:
    """The error has the key that must be set to a file."""
    with pytest.raises(EmptySplitError, match=r"data\.source\.validation is not set; set it to the path of a file"):
        load_summaries(Files(train=write_rows("rows.jsonl", ROWS)), "validation")


def test_missing_file_is_refused_with_its_key_and_path(tmp_path: Path) -> None:
    """The error has the key, its value and the absolute path that does not exist."""
    missing = str(tmp_path / "nothing.jsonl")
    with pytest.raises(DataNotFoundError, match=r"data\.source\.train=.*nothing\.jsonl.* does not exist \(tried /"):
        load_summaries(Files(train=missing))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.jsonl", b'{"article": "a", "summary": "b"}\n{"article": \n'),
        ("broken.parquet", b"this is not a parquet file, though it is named as one"),
        ("broken.csv", b"article,summary\n\xff\xfe,b\n"),
        ("list.jsonl", b"[1, 2\n"),
    ],
)
def test_invalid_file_is_refused_with_its_path_and_format(name: str, content: bytes, tmp_path: Path) -> None:
    """An invalid file is a DataError of one line with its name and the expected format."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} cannot be read as (json|csv|parquet): .+") as error:
        load_summaries(Files(train=str(tmp_path / name)))
    assert type(error.value) is DataError
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", ["article", "summary", "key"])
@pytest.mark.parametrize("ending", FORMATS)
def test_null_is_refused_with_its_row_and_column(ending: str, column: str, write_rows: WriteRows) -> None:
    """A null is not converted to the text None."""
    path = write_rows(f"rows{ending}", [ROWS[0], ROWS[1] | {column: None}])
    with pytest.raises(DataError, match=f"example 1 .*of the train split of .* has no {column}") as error:
        load_summaries(Files(train=path, id="key"))
    assert type(error.value) is DataError


def test_unknown_file_suffix_is_refused() -> None:
    """The recipe is invalid, and the error lists the allowed suffixes."""
    with pytest.raises(ValueError, match=r"must be a file that ends in \.jsonl, \.json, .*\.csv, \.parquet .*pattern"):
        Files(train="rows.xml")


# --- the hub ---------------------------------------------------------------------------------------------------------


def jsonl_copy(folder: Path) -> Path:
    """Write a data set with one JSON lines file per split; return its folder."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"article": f"{split} {n}", "highlights": f"h{n}", "id": f"{split}-{n}"} for n in range(2)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def repository_copy(folder: Path) -> Path:
    """Write a clone of a data set's repository: Parquet files per config, listed in the card's header."""
    import pandas as pd

    header = ["---", "configs:"]
    for config in ("1.0.0", "3.0.0"):
        (folder / config).mkdir(parents=True)
        header += [f"- config_name: {config}", "  data_files:"]
        for split in ("train", "test"):
            table = pd.DataFrame({"article": [f"{config} {split}"], "highlights": ["h"], "id": ["i"]})
            table.to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
            header += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*header, "---", "# A card", ""]), encoding="utf-8")
    return folder


def test_local_folder_is_read_like_a_hub_dataset(tmp_path: Path) -> None:
    """Each split is read from its file, and the fingerprint changes with the content."""
    source = Hub(path=str(jsonl_copy(tmp_path / "copy")), config=None)
    for split in ("train", "validation", "test"):
        assert rows_of(source, split, summary="highlights") == [
            {"id": f"{split}-{n}", "article": f"{split} {n}", "summary": f"h{n}"} for n in range(2)
        ]
    old_fingerprint = source.fingerprint()
    file = next(path for path in sorted((tmp_path / "copy").rglob("*")) if path.is_file())
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert source.fingerprint() != old_fingerprint


@pytest.mark.parametrize("config", ["1.0.0", "3.0.0"])
def test_clone_of_a_repository_is_read_by_config(config: str, tmp_path: Path) -> None:
    """The recipe's config selects the files, as on the Hub."""
    source = Hub(path=str(repository_copy(tmp_path / "clone")), config=config)
    assert rows_of(source, "test", summary="highlights") == [{"id": "i", "article": f"{config} test", "summary": "h"}]


def test_missing_split_is_refused_with_the_available_ones(tmp_path: Path) -> None:
    """The error is an EmptySplitError."""
    source = Hub(path=str(repository_copy(tmp_path / "clone")))
    with pytest.raises(EmptySplitError, match=r"split validation.*does not exist: .*train.*test"):
        load_summaries(source, "validation", summary="highlights")


def test_missing_config_is_refused_with_the_available_ones(tmp_path: Path) -> None:
    """The error is a DataNotFoundError."""
    with pytest.raises(DataNotFoundError, match=r"config 2\.0\.0.*Available: .*3\.0\.0"):
        load_summaries(Hub(path=str(repository_copy(tmp_path / "clone")), config="2.0.0"))


def test_missing_column_of_a_folder_is_refused_with_the_closest_name(tmp_path: Path) -> None:
    """The check is the same as for files."""
    source = Hub(path=str(jsonl_copy(tmp_path / "copy")), config=None)
    with pytest.raises(MissingColumnError, match=r"has no column 'highlight'; did you mean 'highlights'\?"):
        load_summaries(source, "test", summary="highlight")


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_folder_without_data_is_refused(name: str, tmp_path: Path) -> None:
    """An empty or missing folder: the error lists what was tried and the key for a local copy."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataNotFoundError, match=r"from a folder, the Hub or the cache.*set data\.source\.path"):
        load_summaries(Hub(path=str(tmp_path / name), config=None), "test")


@pytest.mark.parametrize(
    "call", [lambda hub: load_summaries(hub, "test"), lambda hub: hub.fingerprint()], ids=["load", "fingerprint"]
)
def test_offline_hub_is_refused_with_a_local_alternative(
    call: Callable[[Hub], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline without a cached copy: one sentence with the data set and how to use a local copy."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError) as error:
        call(Hub())
    message = str(error.value)
    assert message.startswith("the Hub did not answer for abisee/cnn_dailymail (config 3.0.0, split t")
    assert "set data.source.path to its folder, or data.source.kind=files" in message
    assert "\n" not in message


# --- larger shared data ----------------------------------------------------------------------------------------------


def test_cnn_dailymail_is_read_from_a_folder(shared_data: Path) -> None:
    """Every split has examples with a non-blank article and summary."""
    folder = shared_data / "cnn_dailymail"
    if not folder.is_dir():
        pytest.skip("the slice of CNN/DailyMail is not in the shared data")
    source = Hub(path=str(folder), config=None)
    for split in ("train", "validation", "test"):
        rows = rows_of(source, split, summary="highlights")
        assert len(rows) >= 100
        assert all(row["article"].strip() and row["summary"].strip() for row in rows)
