"""DeepSpeed configs set how states are sharded, but no key of a recipe; each engine has its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftbench.distributed.deepspeed import _RECIPE_KEYS, AUTO, _check_keys, _get_nested
from peftbench.distributed.engines import ENGINES, detect_requested_engine
from tests.helpers.paths import REPOSITORY

FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))


def read(path: Path) -> dict[str, Any]:
    """Return the values of a DeepSpeed config."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def test_each_deepspeed_engine_has_a_config() -> None:
    """Each DeepSpeed engine has one config, and there are no others."""
    assert {path.stem for path in FILES} == {name for name, kind in ENGINES.items() if kind.is_deepspeed}
    assert len(FILES) == 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_values_are_auto(path: Path) -> None:
    """Clipping, accumulation, batch sizes and precision are auto; the config has no optimizer or schedule."""
    config = read(path)
    assert {key: _get_nested(config, key) for key in _RECIPE_KEYS} == dict.fromkeys(_RECIPE_KEYS, AUTO)
    _check_keys(config)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_matches_the_engine_of_its_name(path: Path) -> None:
    """Stage and offload match the engine table, and DeepSpeed does not replace the recipe's optimizer."""
    config = read(path)
    kind = detect_requested_engine(config)
    assert kind is ENGINES[path.stem]
    assert kind.offload_optimizer == "none" or config["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "single"])
def test_every_engine_has_an_accelerate_file(name: str) -> None:
    """Each engine has an accelerate config of its name, which refers to the DeepSpeed config of that name."""
    content = yaml.safe_load((REPOSITORY / "accel_configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    if ENGINES[name].is_deepspeed:
        assert content["deepspeed_config"] == {
            "deepspeed_config_file": f"ds_configs/{name}.json",
            "zero3_init_flag": False,
        }
