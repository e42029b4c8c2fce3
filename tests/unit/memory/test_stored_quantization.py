"""Base models whose folder is quantized: run, record and plan treat them as ``model.quantization`` does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from peftbench.data.sources import Files
from peftbench.errors import CombinationError, OutOfRangeError, UnsupportedModelError
from peftbench.memory.devices import get_device_facts
from peftbench.memory.search import MemoryTarget
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.methods.lora import Lora
from peftbench.modeling.loading import load_config
from peftbench.modeling.quantization import read_stored_quantization
from peftbench.recipe.schema import Model, Profile
from peftbench.training.auto_settings import resolve_for_launch
from tests.helpers.architecture_plans import write_tiny_config
from tests.helpers.methods import ONE_OF_EACH
from tests.helpers.models import FAMILIES
from tests.helpers.records import count_labels_per_row
from tests.helpers.workshop import Workshop

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
STORED: dict[str, tuple[dict[str, Any], torch.dtype, str]] = {
    "nf4": (NF4, torch.float32, "nf4"),
    "nf4 of bf16 weights": (NF4, torch.bfloat16, "nf4"),
    "double, some modules skipped": (
        NF4
        | {
            "bnb_4bit_use_double_quant": True,
            "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp", "transformer.h.1.mlp"],
        },
        torch.float16,
        "nf4_double",
    ),
    "packed in bf16": (NF4 | {"bnb_4bit_quant_storage": "bfloat16"}, torch.bfloat16, "nf4"),
}
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
}
SaveQuantized = Callable[..., Path]


@pytest.fixture(name="save_quantized")
def _save_quantized(workshop: Workshop, tmp_path: Path) -> SaveQuantized:
    """Save a small base model with quantized weights and its tokenizer."""

    def save(architecture: str, arguments: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
        source, folder = workshop.base_folder(architecture), tmp_path / "stored"
        config = BitsAndBytesConfig(**arguments)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        return folder

    return save


FAST_POINTS = {*((stored, "gpt2_tied") for stored in STORED), ("double, some modules skipped", "qwen3")}


@pytest.mark.parametrize(
    ("stored", "architecture"),
    [
        pytest.param(stored, architecture, marks=() if (stored, architecture) in FAST_POINTS else pytest.mark.slow)
        for stored in STORED
        for architecture in FAMILIES
    ],
)
def test_stored_weights_are_recorded_and_planned_as_quantized(
    stored: str, architecture: str, workshop: Workshop, save_quantized: SaveQuantized, sources: dict[str, Files]
) -> None:
    """LoRA trains, the record names the kind, and the plan equals the run's live bytes."""
    arguments, dtype, kind = STORED[stored]
    recipe = workshop.recipe(
        Lora(r=4),
        model={"path": str(save_quantized(architecture, arguments, dtype))},
        data={"padding": "max_length", "source": sources["max_length"]},
        profile=Profile(untimed_steps=2, memory_breakdown=True),
    )
    record = workshop.run(recipe)
    assert record.outcome.kind == "ok"
    assert record.recipe["model"]["quantization"] == kind
    assert any(note.startswith(f"model.quantization is {kind}, because the weights") for note in record.notes)
    skipped = [note for note in record.notes if "does not quantize" in note]
    assert bool(skipped) == ("skipped" in stored)
    resolved, _ = resolve_for_launch(recipe)
    with MemorySimulation(resolved, get_device_facts("cpu").capability, 1) as plan:
        plan.simulate_training(6, 48, count_labels_per_row(record, 6))
    assert [note for note in plan.notes if "does not quantize" in note] == skipped
    assert record.memory_breakdown is not None
    peak = plan.memory_tracker.find_peak()
    assert (peak.nbytes, peak.bytes_by_category) == (
        record.memory_breakdown.peak_bytes,
        record.memory_breakdown.bytes_by_category,
    )


def test_stored_weights_train_as_those_quantized_at_load(workshop: Workshop, save_quantized: SaveQuantized) -> None:
    """The same float32 weights, quantized before or when they are loaded, give equal losses."""
    stored = workshop.recipe(Lora(r=4), model={"path": str(save_quantized("llama_untied", NF4))})
    loaded = workshop.recipe(Lora(r=4), architecture="llama_untied", model={"quantization": "nf4"})
    assert workshop.run(stored).step_losses == workshop.run(loaded).step_losses


def test_stored_int8_trains_with_the_note_of_int8(workshop: Workshop, save_quantized: SaveQuantized) -> None:
    """An 8-bit folder is recorded as int8."""
    folder = save_quantized("llama_untied", {"load_in_8bit": True})
    record = workshop.run(workshop.recipe(Lora(r=4), model={"path": str(folder)}))
    assert (record.outcome.kind, record.recipe["model"]["quantization"]) == ("ok", "int8")
    assert any("the int8 base model rounds its matmul inputs to fp16" in note for note in record.notes)


@pytest.mark.parametrize("name", sorted(name for name, m in ONE_OF_EACH.items() if not m.supports_quantized_base))
def test_methods_that_train_base_weights_refuse_stored_quantization(
    name: str, workshop: Workshop, save_quantized: SaveQuantized
) -> None:
    """Run and plan refuse with the sentence of ``model.quantization``, and nothing is written."""
    recipe = workshop.recipe(ONE_OF_EACH[name], model={"path": str(save_quantized("llama_untied", NF4))})
    message = r"trains weights of the base model; use model\.quantization=null, or method\.kind=lora"
    with pytest.raises(CombinationError, match=message):
        workshop.run(recipe)
    assert not (workshop.output / recipe.name).exists()
    with pytest.raises(CombinationError, match=message):
        MemoryTarget(get_device_facts("t4"), "t4", None).plan(recipe)


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_quantization_is_refused_by_name(kind: str, workshop: Workshop, tmp_path: Path) -> None:
    """The error names the kind and what to do, before any weights are read."""
    folder = tmp_path / kind
    shutil.copytree(workshop.base_folder("llama_untied"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": UNSUPPORTED[kind]}))
    message = rf"{kind} are quantized with {kind} .* set model\.path to an unquantized copy"
    recipe = workshop.recipe(Lora(r=4), model={"path": str(folder)})
    with pytest.raises(UnsupportedModelError, match=message):
        resolve_for_launch(recipe)
    random = workshop.recipe(Lora(r=4), model={"path": str(folder), "init": "random"})
    assert resolve_for_launch(random)[0].model.quantization is None


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_null_is_the_same_as_no_config(init: str, workshop: Workshop, tmp_path: Path) -> None:
    """``"quantization_config": null`` changes nothing, and random weights have no config of stored ones."""
    folder = tmp_path / "null"
    shutil.copytree(workshop.base_folder("llama_untied"), folder)
    config = json.loads((folder / "config.json").read_text())
    stored = UNSUPPORTED["gptq"] if init == "random" else None
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    model = Model(path=str(folder), init=init)  # type: ignore[arg-type]
    assert not hasattr(load_config(model), "quantization_config")
    recipe = workshop.recipe(Lora(r=4), model={"path": str(folder), "init": init})
    assert workshop.run(recipe).outcome.kind == "ok"


def test_another_kind_than_the_stored_one_is_refused(workshop: Workshop, save_quantized: SaveQuantized) -> None:
    """The error has both kinds and the values that are allowed."""
    recipe = workshop.recipe(
        Lora(r=4), model={"path": str(save_quantized("llama_untied", NF4)), "quantization": "int8"}
    )
    with pytest.raises(OutOfRangeError, match=r"int8, but .* stored in nf4; set model.quantization to nf4 or null"):
        resolve_for_launch(recipe)


def test_unquantized_experts_are_noted(workshop: Workshop, tmp_path: Path) -> None:
    """Stacked experts stay float32: the note names them and their share, in the run and the plan."""
    tokenizer = AutoTokenizer.from_pretrained(workshop.base_folder("llama_untied"))
    folder = write_tiny_config("mixtral", tmp_path / "mixtral", tokenizer)
    AutoModelForCausalLM.from_config(load_config(Model(path=str(folder)))).save_pretrained(folder)
    recipe = workshop.recipe(Lora(r=4), model={"path": str(folder), "quantization": "nf4"})
    record = workshop.run(recipe)
    notes = [note for note in record.notes if "does not quantize" in note]
    assert len(notes) == 1
    assert notes[0].startswith("model.quantization=nf4 does not quantize model.layers.*.mlp.experts (")
    assert notes[0] in MemoryTarget(get_device_facts("t4"), "t4", None).plan(recipe).notes


def test_unquantized_folder_has_no_stored_kind(workshop: Workshop) -> None:
    """A plain folder resolves to null."""
    model = Model(path=str(workshop.base_folder("gpt2_tied")))
    assert read_stored_quantization(load_config(model), model.path) is None
