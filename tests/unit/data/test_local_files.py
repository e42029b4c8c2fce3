"""Paths of something other than a readable file: each has its own cause, and it is found before anything else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peftbench.data.sources import Files
from peftbench.errors import DataError, DataNotFoundError, MissingColumnError, PeftbenchError
from tests.helpers.summaries import load_summaries, select_columns

GOOD = '{"article": "a", "summary": "s"}\n'


def make_folder(path: Path) -> None:
    """Make a folder at the path of the file."""
    path.mkdir()


def make_broken_link(path: Path) -> None:
    """Make a link to a file that does not exist."""
    path.symlink_to("gone.jsonl")


def make_circular_link(path: Path) -> None:
    """Make a link to itself."""
    path.symlink_to(path.name)


def make_pipe(path: Path) -> None:
    """Make a named pipe, from which reading would wait forever."""
    os.mkfifo(path)


def make_device(path: Path) -> None:
    """Make a link to a device."""
    path.symlink_to("/dev/null")


@pytest.mark.parametrize(
    ("make", "kind", "cause"),
    [
        (
            make_folder,
            DataNotFoundError,
            "is a folder without a file that ends in .jsonl, .json",
        ),
        (make_broken_link, DataNotFoundError, "is a link to gone.jsonl, which does not exist; correct the link"),
        (make_circular_link, DataError, "cannot be read: Too many levels of symbolic links"),
        (make_pipe, DataError, "is a pipe or a device"),
        (make_device, DataError, "is a pipe or a device"),
    ],
)
@pytest.mark.parametrize("method", ["load", "check"])
def test_path_that_is_no_file_has_its_cause(
    make: object, kind: type[PeftbenchError], cause: str, method: str, tmp_path: Path
) -> None:
    """The message has the key, its value and the cause."""
    path = tmp_path / "rows.jsonl"
    make(path)  # type: ignore[operator]
    source = Files(train=str(path))
    with pytest.raises(PeftbenchError) as error:
        getattr(source, method)("train", select_columns(source))
    assert str(error.value).startswith(f"data.source.train='{path}' {cause}")
    assert type(error.value) is kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("none/rows.jsonl", DataNotFoundError),
        ("rows.jsonl/rows.jsonl", DataNotFoundError),
        ("a\0b.jsonl", DataNotFoundError),
        ("x" * 300 + ".jsonl", DataError),
    ],
    ids=["folder", "below a file", "NUL", "too long"],
)
def test_impossible_path_is_refused(name: str, kind: type[DataError], tmp_path: Path) -> None:
    """No other exception is raised for a path that the system does not accept."""
    (tmp_path / "rows.jsonl").write_text(GOOD, encoding="utf-8")
    with pytest.raises(DataError) as error:
        load_summaries(Files(train=str(tmp_path / name)))
    assert type(error.value) is kind


def test_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system is asked before the file is opened; root, as in a container, may read every file."""
    (tmp_path / "rows.jsonl").write_text(GOOD, encoding="utf-8")
    (tmp_path / "rows.jsonl").chmod(0)
    if os.access(tmp_path / "rows.jsonl", os.R_OK):
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match=r"cannot be read: Permission denied; change its permissions"):
        load_summaries(Files(train=str(tmp_path / "rows.jsonl")))


def test_check_finds_a_wrong_column_or_a_broken_start(tmp_path: Path) -> None:
    """It reads the start of the file and leaves the cache as it is."""
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD * 5000, encoding="utf-8")
    source = Files(train=str(path))
    source.check("train", select_columns(source))
    with pytest.raises(MissingColumnError, match="did you mean 'summary'"):
        source.check("train", select_columns(source, summary="sumary"))
    path.write_text(GOOD * 30 + "{\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 31 ends before its object is complete"):
        source.check("train", select_columns(source))
    path.write_text('{"article": "a", "summary": 5}\n', encoding="utf-8")
    with pytest.raises(DataError, match="has the number 5 in column 'summary'"):
        source.check("train", select_columns(source))
