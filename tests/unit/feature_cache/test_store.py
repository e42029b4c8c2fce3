"""The store of hidden states: sizes to the byte, values to the bit, and whole whatever happens while it is written."""

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
from tests.helpers.disks import mounted
from tests.helpers.paths import REPOSITORY

COUNTS = (3, 9, 1, 14)
WIDTH = 8
OF = {"weights": "w", "examples": "e"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_DIR_ENV, str(folder))
    return folder


def layout(stored: StorageDtype = "fp32", counts: tuple[int, ...] = COUNTS) -> StoreLayout:
    """Of four examples."""
    return StoreLayout(torch.tensor(counts), WIDTH, stored)


def opened(
    stored: StorageDtype = "fp32", announced: list[str] | None = None, of: dict[str, Any] | None = None
) -> FeatureStore:
    """The store of those, and what was said of it."""
    said = [] if announced is None else announced
    return open_store((of or OF) | {"stored": stored}, layout(stored), said.append)


def states(examples: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random ones, as many as the examples have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((sum(COUNTS[i] for i in examples), WIDTH), generator=generator)


@pytest.mark.parametrize(("stored", "size"), [("fp32", 27 * 8 * 4), ("bf16", 27 * 8 * 2)])
def test_sizes_are_exact_and_stated_before(stored: StorageDtype, size: int) -> None:
    """One row for each labelled position and one byte for each example, all of it allocated; said once."""
    said: list[str] = []
    store = opened(stored, said)
    assert (store.directory / "features").stat().st_size == store.nbytes == size
    assert (store.directory / "completed").stat().st_size == 4
    assert (store.directory / "features").stat().st_blocks * 512 >= size
    assert said == [f"hidden states of 27 labelled positions take {size:,} bytes in {store.directory}"]
    opened(stored, said)
    assert len(said) == 1


@pytest.mark.parametrize("pinned", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_float32_comes_back_to_the_last_bit(pinned: bool) -> None:
    """In any order and company, and in another opening of the same store; what was not written is not there."""
    if pinned and not torch.cuda.is_available():
        pytest.skip("no GPU")
    store = opened()
    assert store.completed_mask().tolist() == [False] * 4
    given = states((2, 0, 1))
    store.write((2, 0, 1), given)
    again = opened()
    assert again.completed_mask().tolist() == store.completed_mask().tolist() == [True, True, True, False]
    read = again.read((1, 2), pin_memory=pinned)
    assert read.is_pinned() is pinned
    assert torch.equal(read, torch.cat((given[4:], given[:1])))
    with pytest.raises(KeyError, match="example 3"):
        again.read((0, 3))


def test_bf16_is_rounded_to_nearest() -> None:
    """Stored values are the type's nearest, and are given as they are stored."""
    store = opened("bf16")
    given = states((3,))
    store.write((3,), given)
    read = opened("bf16").read((3,))
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, given.to(torch.bfloat16))
    assert not torch.equal(read.float(), given)
    torch.testing.assert_close(read.float(), given, rtol=2**-8, atol=0)


def test_what_is_there_stays() -> None:
    """A second writer of an example changes none of its rows, and too few rows are a fault."""
    store = opened()
    store.write((1,), states((1,)))
    store.write((0, 1), states((0, 1), seed=1))
    assert torch.equal(store.read((1,)), states((1,)))
    assert torch.equal(store.read((0,)), states((0, 1), seed=1)[:3])
    with pytest.raises(ValueError, match="got 13 hidden states for the 14"):
        store.write((3,), torch.zeros(13, WIDTH))


def test_no_page_of_it_stays_in_the_process() -> None:
    """What was written or read is in the system's cache and not in this process's memory, whose peak is a figure."""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("not Linux")
    big = StoreLayout(torch.tensor([4096] * 8), 1024, "fp32")
    store = open_store(OF, big, print)
    for example in range(8):
        store.write((example,), torch.ones(4096, 1024))
        assert store.read((example,)).sum() == 4096 * 1024
    found = Path("/proc/self/smaps").read_text(encoding="utf-8").split(str(store.directory / "features"), 1)[1]
    resident = next(line for line in found.splitlines() if line.startswith("Rss:"))
    assert int(resident.split()[1]) == 0


def test_the_name_is_of_all_that_states_depend_on() -> None:
    """Any other value is another folder; the same values in another order are the same."""
    assert hash_cache_key(OF) != hash_cache_key(OF | {"weights": "v"}) != hash_cache_key(OF | {"more": None})
    assert hash_cache_key(OF) == hash_cache_key(dict(reversed(OF.items())))
    assert opened().directory != opened("bf16").directory
    assert opened(of=OF | {"examples": "f"}).directory != opened().directory


def _states_cut(folder: Path) -> None:
    os.truncate(folder / "features", 27 * 8 * 4 - 1)


def _flags_grown(folder: Path) -> None:
    (folder / "completed").write_bytes(b"\1" * 5)


def _flags_odd(folder: Path) -> None:
    (folder / "completed").write_bytes(b"\1\1\7\1")


def _meta_gone(folder: Path) -> None:
    (folder / "metadata.json").unlink()


def _meta_torn(folder: Path) -> None:
    path = folder / "metadata.json"
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")


def _meta_of_another(folder: Path) -> None:
    path = folder / "metadata.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"hidden_size": 8', '"hidden_size": 9'), encoding="utf-8")


DAMAGES = [_states_cut, _flags_grown, _flags_odd, _meta_gone, _meta_torn, _meta_of_another]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_one_is_made_anew(damage: Any) -> None:
    """Nothing of it is believed, and the size is said again; whoever has the old one open is not disturbed."""
    store = opened()
    store.write((0, 1, 2, 3), states((0, 1, 2, 3)))
    before = store.read((0, 1))
    damage(store.directory)
    said: list[str] = []
    again = opened(announced=said)
    assert len(said) == 1
    assert not again.completed_mask().any()
    assert (again.directory / "features").stat().st_size == again.nbytes
    if damage is not _states_cut and damage is not _flags_grown and damage is not _flags_odd:
        assert torch.equal(store.read((0, 1)), before)


def test_after_a_crash_of_the_machine_only_what_was_sealed_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags may be on the disk and their rows not; a sealed store is whole on it, and a part is not sealed."""
    store = opened()
    store.write((0, 1, 2), states((0, 1, 2)))
    store.mark_durable()
    monkeypatch.setattr(store_module, "_read_boot_id", lambda: "another")
    assert not opened().completed_mask().any()
    store = opened()
    store.write((0, 1, 2, 3), states((0, 1, 2, 3)))
    store.mark_durable()
    monkeypatch.setattr(store_module, "_read_boot_id", lambda: "a third")
    assert opened().completed_mask().all()


SCRIPT = """
import os, signal, sys, torch
from peftbench.feature_cache.store import StoreLayout, open_store
layout = StoreLayout(torch.tensor([3, 9, 1, 14]), 8, "fp32")
store = open_store({"weights": "w", "examples": "e", "stored": "fp32"}, layout, lambda line: print("made", flush=True))
"""


def child(script: str) -> subprocess.Popen[str]:
    """A process that has the store open and goes on with ``script``."""
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", SCRIPT + textwrap.dedent(script)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


def test_kill_between_rows_and_flag_leaves_the_example_out() -> None:
    """Rows without a flag are not there; those that had one are, to the bit."""
    process = child("""
        store.write((0,), torch.full((3, 8), 7.0))

        class Killer:
            def __getitem__(self, example): return 0
            def __setitem__(self, example, value): os.kill(os.getpid(), signal.SIGKILL)

        store._completed = Killer()
        store.write((1,), torch.full((9, 8), 5.0))
    """)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    store = opened()
    assert (store._features[3:12] == 5).all(), "the rows were written: it was killed after them"
    assert store.completed_mask().tolist() == [True, False, False, False]
    assert (store.read((0,)) == 7).all()
    store.write((1,), states((1,)))
    assert torch.equal(store.read((1,)), states((1,)))


def test_two_processes_share_one_store() -> None:
    """Started at once, one makes it, both write, and each reads what the other wrote while both live."""
    body = """
        input()
        store.write((MINE, MINE + 2), torch.full((sum([3, 9, 1, 14][i] for i in (MINE, MINE + 2)), 8), 1.0 + MINE))
        print("written", flush=True)
        input()
        print(*(float(store.read((i,)).mean()) for i in range(4)), flush=True)
    """
    both = [child(body.replace("MINE", str(number))) for number in (0, 1)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = []
    for process in both:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if line == "made":
            said.append(line)
            line = process.stdout.readline().strip()
        assert line == "written"
    assert said == ["made"]
    for process in both:
        out, _ = process.communicate("go\n", timeout=60)
        assert out.split() == ["1.0", "2.0", "1.0", "2.0"]
    assert opened().completed_mask().all()


def test_a_disk_without_room_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is needed, what is there and what to do, in one sentence; nothing lies on the disk."""
    with mounted(tmp_path / "disk", "size=64k") as disk:
        monkeypatch.setenv(CACHE_DIR_ENV, str(disk / "cache"))
        said: list[str] = []
        with pytest.raises(DiskFullError) as raised:
            open_store(OF, StoreLayout(torch.tensor([1000] * 4), WIDTH, "fp32"), said.append)
        assert said == []
        assert list(disk.iterdir()) == []
        assert "take 128,000 bytes in" in str(raised.value)
        assert "has 65,536 bytes free" in str(raised.value)
        assert f"set {CACHE_DIR_ENV} to a folder on a larger disk" in str(raised.value)
        store = open_store(OF, StoreLayout(torch.tensor([500]), WIDTH, "fp32"), said.append)  # what fits is made
        store.write((0,), torch.ones(500, WIDTH))
        del store  # or the disk is busy


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room is taken before the first row, so that no write through the map can find none."""
    with mounted(tmp_path / "disk", "size=64k") as disk:
        monkeypatch.setenv(CACHE_DIR_ENV, str(disk))
        monkeypatch.setattr(
            "peftbench.feature_cache.store._check_disk_space", lambda *_: None
        )  # as if another had taken it since
        with pytest.raises(DiskFullError, match="the disk is full"):
            open_store(OF, StoreLayout(torch.tensor([1000] * 4), WIDTH, "fp32"), print)
        assert [path.name for path in (disk / "feature_cache").iterdir()] == [f"{get_store_dir(OF).name}.lock"]
        store = open_store(OF, StoreLayout(torch.tensor([1000]), WIDTH, "fp32"), print)
        (disk / "other").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
        assert os.statvfs(disk).f_bavail == 0
        store.write((0,), torch.ones(1000, WIDTH))  # on a disk that is full by now
        assert store.read((0,)).sum() == 1000 * WIDTH
        del store  # or the disk is busy


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As any other place."""
    with mounted(tmp_path / "disk", "ro") as disk:
        monkeypatch.setenv(CACHE_DIR_ENV, str(disk / "cache"))
        with pytest.raises(OutputError, match="cannot write"):
            opened()
