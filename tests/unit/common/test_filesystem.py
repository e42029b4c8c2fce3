"""A file is written whole or not at all, and a place that cannot be written is told in one sentence."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from peftbench.common.filesystem import CACHE_DIR_ENV, cache_dir, write_atomically, write_error
from peftbench.errors import DiskFullError, OutputError
from tests.helpers.disks import mounted

TEXT = "né en ligne\n" * 1000


def everything_below(folder: Path) -> list[str]:
    """Names of all files and folders below ``folder``, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_writes_the_text_as_utf8(tmp_path: Path) -> None:
    """The file holds exactly the text, its folders are made, and nothing else is left beside it."""
    path = tmp_path / "a" / "b" / "file.txt"
    write_atomically(path, TEXT)
    assert path.read_bytes() == TEXT.encode()
    assert everything_below(tmp_path) == ["a", "a/b", "a/b/file.txt"]


def test_replaces_the_old_content(tmp_path: Path) -> None:
    """A file that is there is replaced whole, also by a shorter text."""
    path = tmp_path / "file.txt"
    write_atomically(path, TEXT)
    write_atomically(path, "short")
    assert path.read_text(encoding="utf-8") == "short"


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    """Others may read the file as they may read any new file, though it was a private temporary one first."""
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file.txt", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o640


def test_a_failure_leaves_the_old_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device fails before the text is on it, the old file stays as it was and no other one lies beside it."""
    path = tmp_path / "file.txt"
    path.write_text("old", encoding="utf-8")

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OutputError, match=r"file\.txt"):
        write_atomically(path, TEXT)
    assert path.read_text(encoding="utf-8") == "old"
    assert everything_below(tmp_path) == ["file.txt"]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a write stays an interrupt and leaves no temporary file."""

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file.txt", TEXT)
    assert everything_below(tmp_path) == []


def test_a_text_without_encoding_leaves_nothing_behind(tmp_path: Path) -> None:
    """A text that UTF-8 cannot hold is a fault of the program, and leaves no temporary file either."""
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "file.txt", "a lone surrogate: \ud800")
    assert everything_below(tmp_path) == []


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    """On a file system that is really full: DiskFullError with the path, the old file whole, nothing half-written."""
    with mounted(tmp_path / "disk", "size=8k") as disk:
        path = disk / "file.txt"
        write_atomically(path, "old")
        with pytest.raises(DiskFullError, match=r"the disk is full: .*file\.txt"):
            write_atomically(path, TEXT)
        assert path.read_text(encoding="utf-8") == "old"
        assert everything_below(disk) == ["file.txt"]


def test_what_a_full_device_answers_is_a_full_disk() -> None:
    """The error that Linux's own full device gives to anyone, root or not, is told as a full disk."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        full.write_text("text", encoding="utf-8")
    assert isinstance(write_error(full, caught.value), DiskFullError)


@pytest.mark.parametrize(("number", "kind"), [(errno.EDQUOT, DiskFullError), (errno.EACCES, OutputError)])
def test_other_reasons(number: int, kind: type[OutputError]) -> None:
    """A used-up quota is a full disk too; a permission is not."""
    assert type(write_error(Path("x"), OSError(number, os.strerror(number)))) is kind


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    """Where a folder of the path is a file, the error names the path and says why, and the file is untouched."""
    file = tmp_path / "file"
    file.write_text("here", encoding="utf-8")
    with pytest.raises(OutputError, match=r"cannot write .*below\.txt: .+") as caught:
        write_atomically(file / "below.txt", "text")
    assert type(caught.value) is OutputError
    assert file.read_text(encoding="utf-8") == "here"


def test_a_read_only_disk_cannot_be_written(tmp_path: Path) -> None:
    """On a file system that is really read-only, for root too: OutputError that says so."""
    with (
        mounted(tmp_path / "disk", "ro") as disk,
        pytest.raises(OutputError, match="Read-only file system") as caught,
    ):
        write_atomically(disk / "file.txt", "text")
    assert type(caught.value) is OutputError


def test_the_cache_goes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variable names the cache folder; without it, or where it is empty, the platform does."""
    monkeypatch.setenv(CACHE_DIR_ENV, str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv(CACHE_DIR_ENV)
    default = cache_dir()
    assert "peftbench" in default.parts
    monkeypatch.setenv(CACHE_DIR_ENV, "")
    assert cache_dir() == default
