"""Paths in a run's folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peftbench.run_dir.layout import (
    CHECKPOINT_METADATA_FILE,
    RunDir,
    get_checkpoint_name,
    get_checkpoint_step,
    list_checkpoints,
)


def add_checkpoint(run_dir: RunDir, training: str, step: int, *, complete: bool = True) -> Path:
    """Create the folder of a checkpoint and return it."""
    folder = run_dir.checkpoints_dir / training / get_checkpoint_name(step)
    folder.mkdir(parents=True)
    if complete:
        (folder / CHECKPOINT_METADATA_FILE).touch()
    return folder


def test_run_dir_of_a_recipe_has_the_documented_paths() -> None:
    """The folder is output_dir/name; its files have the documented names."""
    recipe: Any = SimpleNamespace(output_dir="runs", name="lora")
    run_dir = RunDir.from_recipe(recipe)
    assert run_dir.path == Path("runs/lora")
    assert run_dir.record_file == Path("runs/lora/record.json")
    assert run_dir.status_file == Path("runs/lora/status.json")
    assert run_dir.recipe_file == Path("runs/lora/recipe.yaml")
    assert run_dir.model_dir == Path("runs/lora/model")
    assert run_dir.snapshot_file(0) == Path("runs/lora/oom_snapshot.pickle")
    assert run_dir.snapshot_file(3) == Path("runs/lora/rank3_oom_snapshot.pickle")


def test_find_checkpoints_sorts_by_step(tmp_path: Path) -> None:
    """Complete checkpoints of all trainings are listed, the newest first; incomplete ones are ignored."""
    run_dir = RunDir(tmp_path)
    assert run_dir.find_checkpoints() == []
    assert run_dir.find_latest_checkpoint_step() is None
    second, first, other = (add_checkpoint(run_dir, name, step) for name, step in (("a", 100), ("a", 20), ("b", 30)))
    add_checkpoint(run_dir, "a", 200, complete=False)
    (run_dir.checkpoints_dir / "a" / f"{get_checkpoint_name(300)}.unfinished").mkdir()
    assert run_dir.find_checkpoints() == [second, other, first]
    assert run_dir.find_latest_checkpoint_step() == 100
    assert list_checkpoints(run_dir.checkpoints_dir / "a") == [second, first]


@pytest.mark.parametrize("step", [1, 12345678])
def test_checkpoint_name_has_the_step(step: int) -> None:
    """The step can be read back from the folder's name."""
    assert get_checkpoint_step(Path("x") / get_checkpoint_name(step)) == step
