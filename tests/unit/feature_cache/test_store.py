"""The store of hidden states: file sizes, stored values, damaged stores, killed writers and full disks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from peftbench.common.filesystem import CACHE_DIR_ENV
from peftbench.common.units import format_bytes
from peftbench.errors import DiskFullError, OutputError
from peftbench.feature_cache import store as store_module
from peftbench.feature_cache.store import (
    FeatureStore,
    StorageDtype,
    StoreLayout,
    get_store_dir,
    hash_cache_key,
    open_store,
)
from tests.helpers.disks import mount_tmpfs
from tests.helpers.paths import REPOSITORY

COUNTS = (3, 9, 1, 14)
WIDTH = 8
CACHE_KEY = {"weights": "w", "examples": "e"}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache folder of this test, empty at first."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_DIR_ENV, str(folder))
    return folder


def build_layout(dtype: StorageDtype = "fp32", label_counts: tuple[int, ...] = COUNTS) -> StoreLayout:
    """Return the layout of four examples."""
    return StoreLayout(torch.tensor(label_counts), WIDTH, dtype)


def open_test_store(
    dtype: StorageDtype = "fp32", log: list[str] | None = None, cache_key: dict[str, Any] | None = None
) -> FeatureStore:
    """Open the store of ``cache_key`` or of ``CACHE_KEY``, and append its log messages to ``log``."""
    messages = [] if log is None else log
    return open_store((cache_key or CACHE_KEY) | {"dtype": dtype}, build_layout(dtype), messages.append)


def random_states(examples: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Return random hidden states, one row for each labeled position of ``examples``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((sum(COUNTS[i] for i in examples), WIDTH), generator=generator)


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 27 * 8 * 4), ("bf16", 27 * 8 * 2)])
def test_file_sizes_are_exact_and_logged_once(dtype: StorageDtype, size: int) -> None:
    """Check that each labeled position takes one row and each example one byte, all allocated on disk."""
    log: list[str] = []
    store = open_test_store(dtype, log)
    assert (store.directory / "features").stat().st_size == store.nbytes == size
    assert (store.directory / "completed").stat().st_size == 4
    assert (store.directory / "features").stat().st_blocks * 512 >= size
    assert log == [f"hidden states of 27 labeled positions take {format_bytes(size)} in {store.directory}"]
    open_test_store(dtype, log)
    assert len(log) == 1


@pytest.mark.parametrize("pin_memory", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_float32_states_are_read_back_bit_identically(pin_memory: bool) -> None:
    """Read examples in another order from a second opening of the store; an unwritten example raises KeyError."""
    if pin_memory and not torch.cuda.is_available():
        pytest.skip("no GPU")
    store = open_test_store()
    assert store.completed_mask().tolist() == [False] * 4
    written = random_states((2, 0, 1))
    store.write((2, 0, 1), written)
    reopened = open_test_store()
    assert reopened.completed_mask().tolist() == store.completed_mask().tolist() == [True, True, True, False]
    loaded = reopened.read((1, 2), pin_memory=pin_memory)
    assert loaded.is_pinned() is pin_memory
    assert torch.equal(loaded, torch.cat((written[4:], written[:1])))
    with pytest.raises(KeyError, match="example 3"):
        reopened.read((0, 3))


def test_bf16_states_are_rounded_to_nearest() -> None:
    """Check that the store returns bf16, with values rounded to nearest."""
    store = open_test_store("bf16")
    written = random_states((3,))
    store.write((3,), written)
    loaded = open_test_store("bf16").read((3,))
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded, written.to(torch.bfloat16))
    assert not torch.equal(loaded.float(), written)
    torch.testing.assert_close(loaded.float(), written, rtol=2**-8, atol=0)


def test_stored_examples_are_not_overwritten() -> None:
    """Check that a second write changes no row of a stored example, and that missing rows raise ValueError."""
    store = open_test_store()
    store.write((1,), random_states((1,)))
    store.write((0, 1), random_states((0, 1), seed=1))
    assert torch.equal(store.read((1,)), random_states((1,)))
    assert torch.equal(store.read((0,)), random_states((0, 1), seed=1)[:3])
    with pytest.raises(ValueError, match="got 13 hidden states for the 14"):
        store.write((3,), torch.zeros(13, WIDTH))


def test_store_pages_are_not_resident_in_the_process() -> None:
    """Check that no page of the features file counts in the process's memory, whose peak is a metric."""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("not Linux")
    large_layout = StoreLayout(torch.tensor([4096] * 8), 1024, "fp32")
    store = open_store(CACHE_KEY, large_layout, print)
    for example in range(8):
        store.write((example,), torch.ones(4096, 1024))
        assert store.read((example,)).sum() == 4096 * 1024
    mapping = Path("/proc/self/smaps").read_text(encoding="utf-8").split(str(store.directory / "features"), 1)[1]
    resident = next(line for line in mapping.splitlines() if line.startswith("Rss:"))
    assert int(resident.split()[1]) == 0


def test_store_folder_depends_on_every_value_of_the_cache_key() -> None:
    """Check that another value or key changes the folder, and that the order of keys does not."""
    assert (
        hash_cache_key(CACHE_KEY)
        != hash_cache_key(CACHE_KEY | {"weights": "v"})
        != hash_cache_key(CACHE_KEY | {"more": None})
    )
    assert hash_cache_key(CACHE_KEY) == hash_cache_key(dict(reversed(CACHE_KEY.items())))
    assert open_test_store().directory != open_test_store("bf16").directory
    assert open_test_store(cache_key=CACHE_KEY | {"examples": "f"}).directory != open_test_store().directory


def _truncate_features(folder: Path) -> None:
    os.truncate(folder / "features", 27 * 8 * 4 - 1)


def _add_completed_flag(folder: Path) -> None:
    (folder / "completed").write_bytes(b"\1" * 5)


def _write_invalid_flag(folder: Path) -> None:
    (folder / "completed").write_bytes(b"\1\1\7\1")


def _delete_metadata(folder: Path) -> None:
    (folder / "metadata.json").unlink()


def _truncate_metadata(folder: Path) -> None:
    path = folder / "metadata.json"
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")


def _change_hidden_size(folder: Path) -> None:
    path = folder / "metadata.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"hidden_size": 8', '"hidden_size": 9'), encoding="utf-8")


DAMAGES = [
    _truncate_features,
    _add_completed_flag,
    _write_invalid_flag,
    _delete_metadata,
    _truncate_metadata,
    _change_hidden_size,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_store_is_created_again(damage: Any) -> None:
    """Check that no example counts as stored and the size is logged again.

    A process that has the old store open can still read it, unless the damage changed its files in place.
    """
    store = open_test_store()
    store.write((0, 1, 2, 3), random_states((0, 1, 2, 3)))
    original = store.read((0, 1))
    damage(store.directory)
    log: list[str] = []
    reopened = open_test_store(log=log)
    assert len(log) == 1
    assert not reopened.completed_mask().any()
    assert (reopened.directory / "features").stat().st_size == reopened.nbytes
    if damage is not _truncate_features and damage is not _add_completed_flag and damage is not _write_invalid_flag:
        assert torch.equal(store.read((0, 1)), original)


def test_only_a_durable_store_survives_a_reboot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the boot id: an incomplete store cannot be marked durable and is discarded, a complete one is kept.

    After a crash of the machine, flags may be on disk while their rows are not.
    """
    store = open_test_store()
    store.write((0, 1, 2), random_states((0, 1, 2)))
    store.mark_durable()
    monkeypatch.setattr(store_module, "_read_boot_id", lambda: "another")
    assert not open_test_store().completed_mask().any()
    store = open_test_store()
    store.write((0, 1, 2, 3), random_states((0, 1, 2, 3)))
    store.mark_durable()
    monkeypatch.setattr(store_module, "_read_boot_id", lambda: "a third")
    assert open_test_store().completed_mask().all()


SCRIPT_HEAD = """
import os, signal, sys, torch
from peftbench.feature_cache.store import StoreLayout, open_store
layout = StoreLayout(torch.tensor([3, 9, 1, 14]), 8, "fp32")
cache_key = {"weights": "w", "examples": "e", "dtype": "fp32"}
store = open_store(cache_key, layout, lambda line: print("created", flush=True))
"""


def start_process(script: str) -> subprocess.Popen[str]:
    """Start a process that opens the store and then runs ``script``."""
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", SCRIPT_HEAD + textwrap.dedent(script)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


def test_kill_between_rows_and_flag_leaves_the_example_unstored() -> None:
    """Check that rows without a flag do not count as stored, and that rows with a flag are exact."""
    process = start_process("""
        store.write((0,), torch.full((3, 8), 7.0))

        class KillingFlags:
            def __getitem__(self, example): return 0
            def __setitem__(self, example, value): os.kill(os.getpid(), signal.SIGKILL)

        store._completed = KillingFlags()
        store.write((1,), torch.full((9, 8), 5.0))
    """)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    store = open_test_store()
    assert (store._features[3:12] == 5).all(), "the process must write the rows before it is killed"
    assert store.completed_mask().tolist() == [True, False, False, False]
    assert (store.read((0,)) == 7).all()
    store.write((1,), random_states((1,)))
    assert torch.equal(store.read((1,)), random_states((1,)))


def test_two_processes_share_one_store() -> None:
    """Start two processes at once: one creates the store, both write, and each reads the rows of the other."""
    body = """
        input()
        store.write((RANK, RANK + 2), torch.full((sum([3, 9, 1, 14][i] for i in (RANK, RANK + 2)), 8), 1.0 + RANK))
        print("written", flush=True)
        input()
        print(*(float(store.read((i,)).mean()) for i in range(4)), flush=True)
    """
    processes = [start_process(body.replace("RANK", str(number))) for number in (0, 1)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    creation_messages = []
    for process in processes:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if line == "created":
            creation_messages.append(line)
            line = process.stdout.readline().strip()
        assert line == "written"
    assert creation_messages == ["created"]
    for process in processes:
        out, _ = process.communicate("go\n", timeout=60)
        assert out.split() == ["1.0", "2.0", "1.0", "2.0"]
    assert open_test_store().completed_mask().all()


def test_too_small_disk_is_refused_before_any_file_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the error has the required bytes, the free bytes and what to do."""
    with mount_tmpfs(tmp_path / "disk", "size=64k") as disk:
        monkeypatch.setenv(CACHE_DIR_ENV, str(disk / "cache"))
        log: list[str] = []
        with pytest.raises(DiskFullError) as excinfo:
            open_store(CACHE_KEY, StoreLayout(torch.tensor([1000] * 4), WIDTH, "fp32"), log.append)
        assert log == []
        assert list(disk.iterdir()) == []
        assert "take 125 KiB in" in str(excinfo.value)
        assert "has 64 KiB free" in str(excinfo.value)
        assert f"set {CACHE_DIR_ENV} to a folder on a larger disk" in str(excinfo.value)
        store = open_store(
            CACHE_KEY, StoreLayout(torch.tensor([500]), WIDTH, "fp32"), log.append
        )  # smaller than the disk
        store.write((0,), torch.ones(500, WIDTH))
        del store  # an open store keeps the disk busy


def test_disk_space_is_reserved_when_the_store_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a write through mmap succeeds on a disk that was filled after the store was created."""
    with mount_tmpfs(tmp_path / "disk", "size=64k") as disk:
        monkeypatch.setenv(CACHE_DIR_ENV, str(disk))
        monkeypatch.setattr(
            "peftbench.feature_cache.store._check_disk_space", lambda *_: None
        )  # another process fills the disk after this check
        with pytest.raises(DiskFullError, match="the disk is full"):
            open_store(CACHE_KEY, StoreLayout(torch.tensor([1000] * 4), WIDTH, "fp32"), print)
        assert [path.name for path in (disk / "feature_cache").iterdir()] == [f"{get_store_dir(CACHE_KEY).name}.lock"]
        store = open_store(CACHE_KEY, StoreLayout(torch.tensor([1000]), WIDTH, "fp32"), print)
        (disk / "other").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
        assert os.statvfs(disk).f_bavail == 0
        store.write((0,), torch.ones(1000, WIDTH))  # the disk is full
        assert store.read((0,)).sum() == 1000 * WIDTH
        del store  # an open store keeps the disk busy


def test_read_only_cache_folder_raises_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that an unwritable cache folder raises the error of any unwritable path."""
    with mount_tmpfs(tmp_path / "disk", "ro") as disk:
        monkeypatch.setenv(CACHE_DIR_ENV, str(disk / "cache"))
        with pytest.raises(OutputError, match="cannot write"):
            open_test_store()
