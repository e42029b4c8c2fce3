"""A real pretrained instruct model with a chat template, if the files next to the checkout can make one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MAKE_MODEL = Path(__file__).parents[3] / "shared" / "models" / "smollm2.py"


def make_instruct_model(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct to ``folder``; skip the test where that is not possible."""
    if not MAKE_MODEL.is_file():
        pytest.skip(f"{MAKE_MODEL} does not exist")
    made = subprocess.run(
        [sys.executable, str(MAKE_MODEL), str(folder)], capture_output=True, text=True, check=False, timeout=300
    )
    if made.returncode or not (folder / "model.safetensors").is_file():
        pytest.skip(f"the instruct model cannot be made: {made.stderr[-300:]}")
    return folder
