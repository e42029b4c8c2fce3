"""``model.attention``: which implementation auto selects, and the refusal of one that the architecture lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedConfig, PreTrainedTokenizerBase

from peftbench.errors import UnsupportedModelError
from peftbench.memory.devices import load_devices
from peftbench.memory.search import MemoryTarget
from peftbench.methods.lora import Lora
from peftbench.modeling.attention_implementation import list_attention_implementations, select_attention
from peftbench.modeling.loading import load_model
from peftbench.modeling.mask_free import find_mask_free_blocker
from peftbench.recipe.schema import Model
from tests.helpers.models import gpt2_config, llama_config
from tests.helpers.workshop import Workshop


def gemma2_config() -> PreTrainedConfig:
    """Return a small Gemma 2, whose softcapped attention has no sdpa kernel."""
    return Gemma2Config(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        sliding_window=32,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


@pytest.fixture
def gemma2_folder(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """Return the folder of a small Gemma 2 with random weights."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(gemma2_config()).save_pretrained(tmp_path / "gemma2")
    tokenizer.save_pretrained(tmp_path / "gemma2")
    return tmp_path / "gemma2"


@pytest.mark.parametrize(
    ("build_config", "can_use_flash", "expected"),
    [
        (gpt2_config, False, "sdpa"),
        (gpt2_config, True, "flash_attention_2"),
        (llama_config, False, "sdpa"),
        (gemma2_config, False, "eager"),
        (gemma2_config, True, "flash_attention_2"),
    ],
)
def test_auto_is_the_first_that_architecture_and_device_have(
    build_config: Callable[[], PreTrainedConfig], can_use_flash: bool, expected: str
) -> None:
    """The order is flash_attention_2, sdpa, eager."""
    attention, reason = select_attention(
        Model(), build_config(), "folder", flash_obstacle=None if can_use_flash else "no flash"
    )
    assert attention == expected
    assert (reason == "no flash") == (expected == "sdpa" and not can_use_flash)


def test_selected_implementation_is_the_loaded_one(gemma2_folder: Path) -> None:
    """Transformers loads what auto selects."""
    model = load_model(Model(path=str(gemma2_folder))).model
    assert model.config._attn_implementation == "eager"


def test_explicit_implementation_that_the_architecture_lacks_is_refused(gemma2_folder: Path) -> None:
    """The message names the implementations that it has."""
    with pytest.raises(UnsupportedModelError, match=r"gemma2 does not support model\.attention=sdpa; .* or eager"):
        load_model(Model(path=str(gemma2_folder), attention="sdpa"))


def test_architecture_without_sdpa_is_trained_and_planned(gemma2_folder: Path, workshop: Workshop) -> None:
    """The record and the plan note eager."""
    recipe = workshop.recipe(
        Lora(r=2), model={"path": str(gemma2_folder), "attention": "auto"}, train={"precision": "auto"}
    )
    record = workshop.run(recipe)
    assert record.outcome.kind == "ok"
    assert record.recipe["model"]["attention"] == "eager"
    assert any("model.attention is eager (gemma2 does not support sdpa)" in note for note in record.notes)
    plan = MemoryTarget(load_devices()["t4"], "t4", None).plan(recipe)
    assert any("train.precision is fp16" in note and "model.attention is eager" in note for note in plan.notes)


def test_config_without_a_causal_model_has_no_implementation() -> None:
    """Loading it raises the error that names the architecture."""
    from transformers import ViTConfig

    assert list_attention_implementations(Model(), ViTConfig(), "folder") == []


@pytest.mark.parametrize("precision", ["bf16", "auto"])
def test_flash_attention_is_planned_as_sdpa(workshop: Workshop, precision: str) -> None:
    """The plan has the same bytes, and a note; flash-attn need not be installed."""
    target = MemoryTarget(load_devices()["h100"], "h100", 2**34)
    sdpa, flash = (
        target.plan(workshop.recipe(Lora(r=2), model={"attention": name}, train={"precision": precision}))
        for name in ("sdpa", "flash_attention_2")
    )
    assert flash.phase_peaks == sdpa.phase_peaks
    assert list(flash.notes) == ["flash_attention_2 is planned as sdpa", *sdpa.notes]


def test_packed_rows_do_not_depend_on_flash_attention(base_folder: Callable[[str], Path], gemma2_folder: Path) -> None:
    """Mask-free attention replaces flash attention as it replaces sdpa, unless the architecture lacks sdpa."""
    gpt2, gemma2 = (load_model(Model(path=str(path))).model for path in (base_folder("gpt2_tied"), gemma2_folder))
    for model in (gpt2, gemma2):
        model.config._attn_implementation = "flash_attention_2"
    assert find_mask_free_blocker(gpt2) is None
    assert gpt2.config._attn_implementation == "flash_attention_2"
    assert find_mask_free_blocker(gemma2) == "its attention is flash_attention_2"
