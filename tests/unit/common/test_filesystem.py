"""Atomic writes, errors of unwritable paths, and the cache folder."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from peftbench.common.filesystem import CACHE_DIR_ENV, cache_dir, write_atomically, write_error
from peftbench.errors import DiskFullError, OutputError
from tests.helpers.disks import mount_tmpfs

TEXT = "né en ligne\n" * 1000


def list_paths_below(folder: Path) -> list[str]:
    """Return the relative paths of all files and folders below ``folder``, including hidden ones."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_write_atomically_writes_utf8_and_creates_folders(tmp_path: Path) -> None:
    """Check that the file has exactly the text and that no other file is left next to it."""
    path = tmp_path / "a" / "b" / "file.txt"
    write_atomically(path, TEXT)
    assert path.read_bytes() == TEXT.encode()
    assert list_paths_below(tmp_path) == ["a", "a/b", "a/b/file.txt"]


def test_write_atomically_replaces_old_content(tmp_path: Path) -> None:
    """Check that a shorter text replaces all of an existing file."""
    path = tmp_path / "file.txt"
    write_atomically(path, TEXT)
    write_atomically(path, "short")
    assert path.read_text(encoding="utf-8") == "short"


def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    """Check that the file has the permissions of any new file, although the temporary file is private."""
    old_umask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file.txt", "text")
    finally:
        os.umask(old_umask)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o640


def test_failed_write_keeps_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that an I/O error in fsync changes no existing file and leaves no temporary file."""
    path = tmp_path / "file.txt"
    path.write_text("old", encoding="utf-8")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=r"file\.txt"):
        write_atomically(path, TEXT)
    assert path.read_text(encoding="utf-8") == "old"
    assert list_paths_below(tmp_path) == ["file.txt"]


def test_interrupted_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that Ctrl-C during a write raises KeyboardInterrupt and leaves no temporary file."""

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file.txt", TEXT)
    assert list_paths_below(tmp_path) == []


def test_unencodable_text_leaves_no_temporary_file(tmp_path: Path) -> None:
    """Check that text that UTF-8 cannot encode raises UnicodeEncodeError and leaves no temporary file."""
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "file.txt", "a lone surrogate: \ud800")
    assert list_paths_below(tmp_path) == []


def test_full_disk_raises_disk_full_error(tmp_path: Path) -> None:
    """Fill a real file system: DiskFullError has the path, the old file is unchanged, and no other file is left."""
    with mount_tmpfs(tmp_path / "disk", "size=8k") as disk:
        path = disk / "file.txt"
        write_atomically(path, "old")
        with pytest.raises(DiskFullError, match=r"the disk is full: .*file\.txt"):
            write_atomically(path, TEXT)
        assert path.read_text(encoding="utf-8") == "old"
        assert list_paths_below(disk) == ["file.txt"]


def test_error_of_dev_full_becomes_disk_full_error() -> None:
    """Convert the error that Linux's /dev/full raises for every user, including root."""
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="No space left") as excinfo:
        device.write_text("text", encoding="utf-8")
    assert isinstance(write_error(device, excinfo.value), DiskFullError)


@pytest.mark.parametrize(("number", "kind"), [(errno.EDQUOT, DiskFullError), (errno.EACCES, OutputError)])
def test_write_error_depends_on_errno(number: int, kind: type[OutputError]) -> None:
    """Check that an exceeded quota counts as a full disk and a missing permission does not."""
    assert type(write_error(Path("x"), OSError(number, os.strerror(number)))) is kind


def test_path_below_a_file_raises_output_error(tmp_path: Path) -> None:
    """Check that the error has the path and the reason, and that the file is unchanged."""
    file = tmp_path / "file"
    file.write_text("here", encoding="utf-8")
    with pytest.raises(OutputError, match=r"cannot write .*below\.txt: .+") as excinfo:
        write_atomically(file / "below.txt", "text")
    assert type(excinfo.value) is OutputError
    assert file.read_text(encoding="utf-8") == "here"


def test_read_only_disk_raises_output_error(tmp_path: Path) -> None:
    """Write to a file system that is read-only for every user, including root."""
    with (
        mount_tmpfs(tmp_path / "disk", "ro") as disk,
        pytest.raises(OutputError, match="Read-only file system") as excinfo,
    ):
        write_atomically(disk / "file.txt", "text")
    assert type(excinfo.value) is OutputError


def test_cache_dir_follows_the_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that an unset or empty variable selects the platform's cache folder."""
    monkeypatch.setenv(CACHE_DIR_ENV, str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(CACHE_DIR_ENV, "~/cache")
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv(CACHE_DIR_ENV)
    default = cache_dir()
    assert "peftbench" in default.parts
    monkeypatch.setenv(CACHE_DIR_ENV, "")
    assert cache_dir() == default
