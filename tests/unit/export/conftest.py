"""Fixtures of the tests of exports: finished runs, each trained once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.finished_runs import build_recipe, train_run, write_rows

METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("llama_tied", {"kind": "lora", "r": 4}, {}),
    "lora_conv1d": ("gpt2_tied", {"kind": "lora", "r": 4, "bias": "lora_only"}, {}),
    "dora": ("llama_untied", {"kind": "lora", "r": 4, "use_dora": True, "use_rslora": True}, {}),
    "nf4": ("llama_tied", {"kind": "lora", "r": 4}, {"model": {"quantization": "nf4"}}),
    "int8": ("llama_tied", {"kind": "lora", "r": 4}, {"model": {"quantization": "int8"}}),
    "full": ("llama_tied", {"kind": "full"}, {}),
    "last_layer": ("gpt2_tied", {"kind": "last_layer"}, {}),
    "oft": ("gpt2_tied", {"kind": "oft", "oft_block_size": 0, "r": 2}, {}),
    "prompt_tuning": ("gpt2_tied", {"kind": "prompt_tuning", "num_virtual_tokens": 4}, {}),
}
"""By name of the run: architecture, method and other sections of the recipe."""


@pytest.fixture(scope="session")
def finished_run(base_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a name in ``METHODS`` to the folder of that finished run. Tests must not change it."""
    folders: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("runs")
    rows = write_rows(root)

    def train(name: str) -> Path:
        if name not in folders:
            architecture, method, sections = METHODS[name]
            record = train_run(build_recipe(base_folder(architecture), rows, root, method, name=name, **sections))
            assert record.outcome.kind == "ok"
            folders[name] = root / name
        return folders[name]

    return train
