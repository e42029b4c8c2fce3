"""Every source gives the same three columns, and says in one sentence why it cannot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from peftbench.data.base import EXAMPLE_COLUMNS, Source
from peftbench.data.sources import Files, Hub
from peftbench.errors import DataError, DataNotFoundError, EmptySplitError, HubUnreachableError, MissingColumnError

WriteRows = Callable[[str, Sequence[dict[str, Any]]], str]
ROWS = [
    {"key": "a", "article": 'First, with "quotes",\nand a line break.', "summary": "É one", "other": 1},
    {"key": "b", "article": "Second.", "summary": "Two", "other": 2},
]
FORMATS = (".jsonl", ".csv", ".parquet")


def rows_of(source: Source, split: str = "train") -> list[dict[str, str]]:
    """Everything that a source gives of a split."""
    dataset = source.load(split)
    assert set(dataset.column_names) == set(EXAMPLE_COLUMNS)
    return [{column: row[column] for column in EXAMPLE_COLUMNS} for row in dataset]


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", FORMATS)
def test_files_of_every_format_give_the_same(ending: str, write_rows: WriteRows) -> None:
    """The same rows as JSON lines, CSV or Parquet are the same three columns of text, in order; others are dropped."""
    source = Files(train=write_rows(f"rows{ending}", ROWS), id="key")
    assert rows_of(source) == [{"id": row["key"], "article": row["article"], "summary": row["summary"]} for row in ROWS]


@pytest.mark.parametrize("ending", FORMATS)
def test_columns_may_have_other_names(ending: str, write_rows: WriteRows) -> None:
    """Columns are taken by the names that the recipe gives, even where they cross."""
    path = write_rows(f"rows{ending}", [{"summary": "the text", "article": "the summary", "text": "neither"}])
    found = rows_of(Files(train=path, article="summary", summary="article"))
    assert found == [{"id": "0", "article": "the text", "summary": "the summary"}]


def test_rows_without_an_id_are_numbered(write_rows: WriteRows) -> None:
    """Without a column for it, the id is the row's number, from 0."""
    assert [row["id"] for row in rows_of(Files(train=write_rows("rows.jsonl", ROWS)))] == ["0", "1"]


@pytest.mark.parametrize("column", ["id", "article", "summary"])
def test_numbers_become_text(column: str, write_rows: WriteRows) -> None:
    """A column of numbers is text, whether or not it is called what it becomes."""
    rows = [{"id": "a", "article": "text", "summary": "s", column: number} for number in (1, 2)]
    source = Files(train=write_rows("rows.jsonl", rows), id="id")
    assert [row[column] for row in rows_of(source)] == ["1", "2"]
    renamed = [{"id": "a", "article": "text", "summary": "s", "other": number} for number in (1, 2)]
    source = Files(**({"train": write_rows("renamed.jsonl", renamed), "id": "id"} | {column: "other"}))
    assert [row[column] for row in rows_of(source)] == ["1", "2"]


def test_lists_are_no_text(write_rows: WriteRows) -> None:
    """A column of lists is refused, and not made into the text of a list."""
    rows = [{"article": ["a", "b"], "summary": "s"}]
    with pytest.raises(DataError, match=r"column 'article' of the train split of .* does not contain text"):
        Files(train=write_rows("rows.jsonl", rows)).load("train")


def test_a_file_that_gives_nothing_when_read(tmp_path: Path) -> None:
    """What is a file and gives nothing is told by its path, not by a traceback."""
    (tmp_path / "rows.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read"):
        Files(train=str(tmp_path / "rows.jsonl")).fingerprint()


def test_a_local_copy_changes_in_place(tmp_path: Path) -> None:
    """A folder in the place of the hub's data set may change; the hub's own is asked for by its commit."""
    assert Hub(path=str(tmp_path)).is_mutable
    assert not Hub().is_mutable


@pytest.mark.parametrize("column", ["article", "summary"])
def test_blank_text_is_missing(column: str, write_rows: WriteRows) -> None:
    """An example with nothing to read or nothing to write is refused by its number."""
    rows = [{"article": "a", "summary": "s"}, {"article": "a", "summary": "s", column: " \n"}]
    with pytest.raises(DataError, match=rf"example 1 of the train split of .* has no {column}"):
        Files(train=write_rows("rows.jsonl", rows)).load("train")


def test_each_split_has_its_own_file(write_rows: WriteRows) -> None:
    """Splits do not mix."""
    splits = ("train", "validation", "test")
    files = {split: write_rows(f"{split}.jsonl", [{"article": split, "summary": "s"}]) for split in splits}
    source = Files(**files)  # type: ignore[arg-type]
    assert [rows_of(source, split)[0]["article"] for split in splits] == list(splits)


def test_a_changed_file_is_read_again(write_rows: WriteRows) -> None:
    """A file that was changed since it was last read is not taken from the cache, and has another identity."""
    source = Files(train=write_rows("rows.jsonl", [{"article": "old", "summary": "s"}]))
    before, identity = rows_of(source), source.fingerprint()
    path = write_rows("rows.jsonl", [{"article": "new", "summary": "s"}])
    os.utime(path, (1, 1))  # an older date than before, as a restored file has
    assert before[0]["article"] == "old"
    assert rows_of(source)[0]["article"] == "new"
    assert source.fingerprint() != identity


def test_the_identity_is_of_the_content(write_rows: WriteRows) -> None:
    """Two copies of a file under different names are the same data."""
    first, second = (Files(train=write_rows(name, ROWS)) for name in ("one.jsonl", "deep/two.jsonl"))
    assert first.fingerprint() == second.fingerprint()


@pytest.mark.parametrize(
    ("name", "nearest"), [("artcle", r"did you mean 'article'\?"), ("zzz", "allowed: key, article, summary, other")]
)
@pytest.mark.parametrize("ending", FORMATS)
def test_a_missing_column_names_the_nearest(ending: str, name: str, nearest: str, write_rows: WriteRows) -> None:
    """A column that is not there is told with the split, the file, and the column that may have been meant."""
    source = Files(train=write_rows(f"rows{ending}", ROWS), article=name)
    with pytest.raises(MissingColumnError, match=rf"train split of .*rows\{ending} has no column '{name}'; {nearest}"):
        source.load("train")


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
def test_a_file_without_examples(name: str, content: str, tmp_path: Path) -> None:
    """A file of no bytes, of blank lines, or with a header alone is an empty split, told by its path."""
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(EmptySplitError, match=name):
        Files(train=str(tmp_path / name)).load("train")


def test_a_table_without_rows(write_rows: WriteRows, tmp_path: Path) -> None:
    """A Parquet file with columns and no rows is an empty split."""
    import pandas as pd

    pd.DataFrame({"article": pd.Series([], dtype=str), "summary": pd.Series([], dtype=str)}).to_parquet(
        tmp_path / "none.parquet"
    )
    with pytest.raises(EmptySplitError, match=r"none\.parquet"):
        Files(train=str(tmp_path / "none.parquet")).load("train")


def test_a_split_without_a_file(write_rows: WriteRows) -> None:
    """A split that the recipe needs and names no file for is told by the knob to set."""
    with pytest.raises(EmptySplitError, match=r"data\.source\.validation is not set; set it to a file"):
        Files(train=write_rows("rows.jsonl", ROWS)).load("validation")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """A missing file is told by its knob and by the place that was looked at."""
    missing = str(tmp_path / "nothing.jsonl")
    with pytest.raises(DataNotFoundError, match=r"data\.source\.train=.*nothing\.jsonl.* does not exist \(tried /"):
        Files(train=missing).load("train")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.jsonl", b'{"article": "a", "summary": "b"}\n{"article": \n'),
        ("broken.parquet", b"this is no parquet file, though it is named as one"),
        ("broken.csv", b"article,summary\n\xff\xfe,b\n"),
        ("list.jsonl", b"[1, 2\n"),
    ],
)
def test_a_file_that_cannot_be_read(name: str, content: bytes, tmp_path: Path) -> None:
    """A broken file is a DataError of one line with its path and the format that was tried."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} cannot be read as (json|csv|parquet): .+") as caught:
        Files(train=str(tmp_path / name)).load("train")
    assert type(caught.value) is DataError
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["article", "summary", "key"])
@pytest.mark.parametrize("ending", FORMATS)
def test_an_example_without_a_value(ending: str, column: str, write_rows: WriteRows) -> None:
    """A null is told by its row and column; it does not become the word None."""
    path = write_rows(f"rows{ending}", [ROWS[0], ROWS[1] | {column: None}])
    with pytest.raises(DataError, match=f"example 1 of the train split of .* has no {column}") as caught:
        Files(train=path, id="key").load("train")
    assert type(caught.value) is DataError


def test_an_unknown_ending_is_refused() -> None:
    """A format that cannot be read is refused with those that can, before anything is read."""
    with pytest.raises(ValueError, match=r"must be a file that ends in \.jsonl, \.json, \.csv, \.parquet"):
        Files(train="rows.xml")


# --- the hub ---------------------------------------------------------------------------------------------------------


def jsonl_copy(folder: Path) -> Path:
    """A data set's folder with one file a split."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"article": f"{split} {n}", "highlights": f"h{n}", "id": f"{split}-{n}"} for n in range(2)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def repository_copy(folder: Path) -> Path:
    """A clone of a data set's repository: Parquet files by configuration, named in the card's header."""
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


def test_a_folder_takes_the_place_of_the_hub(tmp_path: Path) -> None:
    """A folder with a file a split is read as the data set it is a copy of, split by split."""
    source = Hub(path=str(jsonl_copy(tmp_path / "copy")), config=None)
    for split in ("train", "validation", "test"):
        assert rows_of(source, split) == [
            {"id": f"{split}-{n}", "article": f"{split} {n}", "summary": f"h{n}"} for n in range(2)
        ]
    before = source.fingerprint()
    file = next(path for path in sorted((tmp_path / "copy").rglob("*")) if path.is_file())
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert source.fingerprint() != before


@pytest.mark.parametrize("config", ["1.0.0", "3.0.0"])
def test_a_clone_of_a_repository_has_its_configurations(config: str, tmp_path: Path) -> None:
    """A clone is read by the configuration that the recipe names, as on the hub."""
    source = Hub(path=str(repository_copy(tmp_path / "clone")), config=config)
    assert rows_of(source, "test") == [{"id": "i", "article": f"{config} test", "summary": "h"}]


def test_a_split_that_a_copy_lacks(tmp_path: Path) -> None:
    """A split that is not there is an empty split, and the sentence names those that are."""
    source = Hub(path=str(repository_copy(tmp_path / "clone")))
    with pytest.raises(EmptySplitError, match=r"split validation.*does not exist: .*train.*test"):
        source.load("validation")


def test_a_configuration_that_a_copy_lacks(tmp_path: Path) -> None:
    """A configuration that is not there is told with those that are."""
    with pytest.raises(DataNotFoundError, match=r"config 2\.0\.0.*Available: .*3\.0\.0"):
        Hub(path=str(repository_copy(tmp_path / "clone")), config="2.0.0").load("train")


def test_a_column_that_a_copy_lacks(tmp_path: Path) -> None:
    """Columns are checked as in files."""
    source = Hub(path=str(jsonl_copy(tmp_path / "copy")), config=None, summary="highlight")
    with pytest.raises(MissingColumnError, match=r"has no column 'highlight'; did you mean 'highlights'\?"):
        source.load("test")


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_folder_without_data(name: str, tmp_path: Path) -> None:
    """A folder that is empty or not there is told with what was tried and how to point to a local copy."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataNotFoundError, match=r"from a folder, the Hub or the cache.*set data\.source\.path"):
        Hub(path=str(tmp_path / name), config=None).load("test")


@pytest.mark.parametrize(
    "act", [lambda hub: hub.load("test"), lambda hub: hub.fingerprint()], ids=["load", "fingerprint"]
)
def test_a_hub_that_may_not_be_asked(act: Callable[[Hub], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline and without a cached copy: one sentence with what was wanted and how to use a local copy."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError) as caught:
        act(Hub())
    sentence = str(caught.value)
    assert sentence.startswith("the Hub did not answer for abisee/cnn_dailymail (config 3.0.0, split t")
    assert "set data.source.path to its folder, or data.source.kind=files" in sentence
    assert "\n" not in sentence


# --- larger shared data ----------------------------------------------------------------------------------------------


def test_cnn_dailymail_from_a_folder(shared_data: Path) -> None:
    """A real slice of CNN/DailyMail, as a folder, gives examples with text on both sides in every split."""
    folder = shared_data / "cnn_dailymail"
    if not folder.is_dir():
        pytest.skip("the slice of CNN/DailyMail is not in the shared data")
    source = Hub(path=str(folder), config=None)
    for split in ("train", "validation", "test"):
        found = rows_of(source, split)
        assert len(found) >= 100
        assert all(row["article"].strip() and row["summary"].strip() for row in found)
