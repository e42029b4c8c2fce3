"""Fixtures that run the entry point in a subprocess, in a temporary folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "train.py"
ROWS = [
    {  # with different lengths: equal ones would hide a mean of means
        "article": f"The council met on day {number}. It voted on the bridge. " * (2 + number % 5),
        "summary": f"The council votes on day {number} on a bridge." + " And on a road." * (number % 3),
    }
    for number in range(8)
]
RECIPE = {
    "name": "run",
    "output_dir": "out",
    "model": {"path": "shipped"},
    "method": {"kind": "lora"},
    "data": {"source": {"kind": "files", "train": "rows.jsonl", "test": "rows.jsonl"}, "max_length": 128},
    "train": {"steps": 1, "global_batch_size": 4},
    "evaluate": {"generate": False, "max_new_tokens": 8, "bootstrap_resamples": 100},
}


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of launched processes: private caches, one thread, no GPU, and no Hub."""
    folder = tmp_path_factory.mktemp("caches")
    return os.environ | {
        "HF_HOME": str(folder / "huggingface"),
        "PEFTBENCH_CACHE": str(folder / "peftbench"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return the working directory of commands, with a valid recipe and its examples."""
    folder = tmp_path / "work"
    folder.mkdir()
    return write_project(folder)


def write_project(folder: Path) -> Path:
    """Write a valid recipe and its examples to ``folder`` and return it."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return folder


@pytest.fixture
def launch(project: Path, caches: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs ``python launch/train.py``; ``env`` adds to the environment."""

    def run_train_script(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(LAUNCH), *arguments]
        return subprocess.run(
            command, cwd=project, env=caches | (env or {}), capture_output=True, text=True, timeout=280, check=False
        )

    return run_train_script
