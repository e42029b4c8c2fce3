"""Values of config.json from which transformers cannot build the model: one sentence, in every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from peftbench.cli.app import app
from peftbench.errors import ModelNotFoundError, UnsupportedModelError
from peftbench.memory.simulation.model import build_meta_model
from peftbench.methods.lora import Lora
from peftbench.modeling.config_faults import config_faults
from peftbench.modeling.loading import LoadedModel, load_config, load_model
from peftbench.recipe.schema import Model
from tests.helpers.models import gpt2_config
from tests.helpers.project import write_project
from tests.helpers.workshop import Workshop

Folder = Callable[[str], Path]

FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2_tied", {"n_head": 7}, "`embed_dim` must be divisible by num_heads"),
    ("gpt2_tied", {"n_head": 0}, "n_head=0 must be at least 1"),
    ("gpt2_tied", {"n_embd": -64}, "n_embd=-64 must be at least 1"),
    ("gpt2_tied", {"n_layer": -1}, "n_layer=-1 must be at least 1"),
    ("gpt2_tied", {"n_inner": -3}, "n_inner=-3 must be at least 1"),
    ("gpt2_tied", {"n_positions": 0}, "n_positions=0 must be at least 1"),
    ("gpt2_tied", {"vocab_size": "many"}, "Field 'vocab_size' expected int, got str"),
    ("gpt2_tied", {"n_layer": 2.5}, "Field 'n_layer' expected int, got float"),
    ("gpt2_tied", {"activation_function": "nope"}, "activation_function='nope' is not a known value"),
    ("gpt2_tied", {"resid_pdrop": 1.5}, "dropout probability has to be between 0 and 1"),
    ("gpt2_tied", {"dtype": "float33"}, "float33"),
    ("gpt2_tied", {"id2label": 3}, "'int' object has no attribute 'items'"),
    ("gpt2_tied", {"model_type": "nosuch"}, "model_type='nosuch' is not an architecture of transformers"),
    ("gpt2_tied", {"model_type": None}, "it has no model_type"),
    ("gpt2_tied", {"model_type": ["gpt2"]}, r"model_type=\['gpt2'\] is not an architecture"),
    (
        "llama_untied",
        {"num_attention_heads": 7},
        r"hidden size \(64\) is not a multiple of the number of attention heads",
    ),
    ("llama_untied", {"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
    ("llama_untied", {"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    ("llama_untied", {"head_dim": -4}, "head_dim=-4 must be at least 1"),
    ("llama_untied", {"head_dim": 15}, "RoPE requires an even rotary dimension"),
    (
        "llama_untied",
        {"rope_parameters": {"rope_type": "nope"}},
        r"rope_parameters\.rope_type='nope' is not a known value",
    ),
    ("llama_untied", {"rope_scaling": {"type": "linear"}}, "Missing required keys in `rope_parameters`"),
    ("llama_untied", {"rms_norm_eps": None}, "Field 'rms_norm_eps' expected float"),
]


def damage_config(base: Path, folder: Path, change: dict[str, Any]) -> str:
    """Copy a base model to ``folder`` with a changed config; return its path."""
    shutil.copytree(base, folder)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(values | change), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(("architecture", "change", "fault"), FAULTS, ids=[str(change) for _, change, _ in FAULTS])
def test_config_that_transformers_refuses_is_named(
    architecture: str, change: dict[str, Any], fault: str, base_folder: Folder, tmp_path: Path
) -> None:
    """Loading, random weights and the model of an estimate give the same sentence."""
    path = damage_config(base_folder(architecture), tmp_path / "base", change)
    sentences = set()
    loads: list[Callable[[], LoadedModel]] = [
        lambda: load_model(Model(path=path)),
        lambda: load_model(Model(path=path, init="random")),
        lambda: build_meta_model(Model(path=path), torch.float32),
    ]
    for load in loads:
        with pytest.raises(ModelNotFoundError, match=f"cannot use the config of {path}: .*{fault}") as raised:
            load()
        sentences.add(str(raised.value))
    assert len(sentences) == 1
    assert "\n" not in sentences.pop()


@pytest.mark.parametrize("change", [{"n_head": 7}, {"n_embd": -64}, {"model_type": "nosuch"}])
def test_every_command_names_the_fault(
    change: dict[str, Any], workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is refused and leaves no folder; estimate and fit print one line and exit with its code."""
    path = damage_config(workshop.base_folder("gpt2_tied"), tmp_path / "base", change)
    with pytest.raises(ModelNotFoundError, match="cannot use the config of") as raised:
        workshop.run(workshop.recipe(Lora(), model={"path": path}, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(write_project(tmp_path))
    for command in ("estimate", "fit"):
        arguments = [command, "recipe.yaml", f"model.path={path}", "--device", "cpu", "--budget", "8GiB"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == ModelNotFoundError.exit_code, command
        assert result.stderr == f"error: {raised.value}\n"


def test_value_per_layer_is_not_checked_as_a_size(tmp_path: Path) -> None:
    """A list of sizes, as in OpenELM, is left to transformers."""
    values = {"model_type": "mamba", "num_attention_heads": [4, 8], "num_key_value_heads": [3, 2]}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    assert load_config(Model(path=str(tmp_path))).num_attention_heads == [4, 8]


def test_error_with_a_valid_config_is_unchanged() -> None:
    """Running out of memory while a valid model is built is not attributed to its config."""
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"^no memory$"),
        config_faults("base", gpt2_config(), trust_remote_code=False),
    ):
        raise torch.OutOfMemoryError("no memory")


def test_config_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    """An estimate refuses an image classifier with the sentence of a run."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="vit is not a causal language model"):
        build_meta_model(Model(path=str(tmp_path)), torch.float32)
