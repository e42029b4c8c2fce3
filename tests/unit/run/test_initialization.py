"""Runs whose initial values are computed from data: their record, their resume, and their saved model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peftbench.errors import EstimateUnavailableError, UnsupportedModelError
from peftbench.memory.devices import get_device_facts
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.methods import METHOD_KINDS
from peftbench.methods.baselines import ZeroShot
from peftbench.methods.lora import Lora
from peftbench.optim import AdamW
from peftbench.run.runner import Run
from peftbench.training import initialization
from tests.helpers.short_runs import use_small_matmul
from tests.helpers.stopped_runs import run_until_first_checkpoint
from tests.helpers.training import reset_accelerators, single_process_context
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from accelerate import Accelerator

    from peftbench.recipe.schema import Recipe
    from peftbench.record import RunRecord

KINDS = ("eva", "corda", "lora_ga")
FAST_POINTS = {("eva", "llama_untied"), ("corda", "gpt2_tied"), ("lora_ga", "llama_untied")}
POINTS = [
    pytest.param(kind, architecture, marks=() if (kind, architecture) in FAST_POINTS else pytest.mark.slow)
    for kind in KINDS
    for architecture in ("gpt2_tied", "llama_untied")
]
FAST_RESUMES = {("eva", "fp32"), ("corda", "fp32"), ("lora_ga", "bf16")}


def build_recipe(workshop: Workshop, kind: str, *, keys: dict[str, Any] | None = None, **parts: Any) -> Recipe:
    """Return the recipe of a method of rank 4, with the scale 3."""
    options: dict[str, Any] = {"init_examples": 10} | ({"tau": 0.5} if kind == "eva" else {})  # it converges early
    values = {"r": 4, "lora_alpha": 12} | ({} if kind == "loftq" else {f"{kind}_config": options})
    method = METHOD_KINDS[kind].model_validate(values | (keys or {}))
    return workshop.recipe(method, **parts)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_lora_fa_keeps_computed_a(kind: str, precision: str, workshop: Workshop) -> None:
    """A stays frozen where setting the values replaces layers (EVA), and the record has the new counts."""
    parts: dict[str, Any] = {"optimizer": {"kind": "lora_fa"}, "train": {"precision": precision}, "save_model": True}
    recipe = build_recipe(workshop, kind, architecture="llama_untied", **parts)
    record = workshop.run(recipe)
    plain = workshop.run(recipe.model_copy(update={"optimizer": AdamW(), "name": "plain"}))
    assert record.parameters is not None
    assert plain.parameters is not None
    assert record.parameters.added_frozen is not None
    assert record.parameters.trainable + record.parameters.added_frozen == plain.parameters.trainable
    saved = load_file(workshop.output / "run" / "model" / "adapter_model.safetensors")
    assert saved.keys() == load_file(workshop.output / "plain" / "model" / "adapter_model.safetensors").keys()
    trained = sum(tensor.numel() for name, tensor in saved.items() if ".lora_B." in name)
    assert record.parameters.trainable == (trained if kind == "eva" else trained // 2)  # the others save twice the rank


@pytest.mark.parametrize(("kind", "architecture"), POINTS)
def test_pass_is_a_measured_phase(kind: str, architecture: str, workshop: Workshop) -> None:
    """Its seconds are part of the start-up, its peak is in the record, and no step contains its FLOPs."""
    record = workshop.run(build_recipe(workshop, kind, architecture=architecture, save_model=True))
    phases = record.phase_seconds
    assert phases["initialize"] > 0
    assert record.startup_seconds == pytest.approx(phases["load"] + phases["build"] + phases["initialize"])
    assert record.memory["initialize"].rss_bytes
    assert any("initial values were computed in" in note for note in record.notes)
    assert record.flops.counted_step is None or record.flops.counted_step.closed_form_flops is not None
    plain = workshop.run(workshop.recipe(Lora(r=4), architecture=architecture, name="plain"))
    assert "initialize" not in plain.phase_seconds
    assert record.parameters is not None
    assert plain.parameters is not None
    if kind != "eva":
        assert record.parameters == plain.parameters
        assert record.flops.hardware_flops == plain.flops.hardware_flops
    assert record.step_losses[0] == pytest.approx(plain.step_losses[0], rel=1e-4)
    assert record.step_losses[2] != pytest.approx(plain.step_losses[2], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(kind, dtype, marks=() if (kind, dtype) in FAST_RESUMES else pytest.mark.slow)
        for kind in KINDS
        for dtype in ("fp32", "bf16")
    ],
)
def test_resumed_training_uses_the_stored_values(
    kind: str, dtype: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are bit-identical to those of an uninterrupted run, and no initial value is computed again."""
    dropout = {"lora_dropout": 0.1}  # so that random numbers matter
    types: dict[str, Any] = {"model": {"dtype": dtype}, "train": {"precision": dtype}}
    recipe = build_recipe(workshop, kind, keys=dropout, checkpoint={"interval": 1}, save_model=True, **types)
    whole = workshop.run(recipe.model_copy(update={"name": "whole"}))
    run_until_first_checkpoint(workshop, recipe)

    def fail(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("peftbench.run.initialization.compute_initial_values", fail)
    resumed = workshop.run(recipe)
    assert resumed.resumed_after == (1,)
    assert resumed.step_losses == whole.step_losses
    assert resumed.quality is not None
    assert whole.quality is not None
    assert resumed.quality.loss == whole.quality.loss
    weights = [(workshop.output / name / "model/adapter_model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]
    assert not (workshop.output / "run" / "checkpoints").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_training_that_starts_again_computes_the_same_values(kind: str, workshop: Workshop) -> None:
    """Without a checkpoint, the pass is repeated with the same result."""
    recipe = build_recipe(workshop, kind)
    first = workshop.run(recipe)
    again = workshop.run(recipe.model_copy(update={"name": "again"}))
    assert again.step_losses == first.step_losses


@pytest.mark.parametrize(("kind", "architecture"), POINTS)
def test_saved_model_is_evaluated_without_a_pass(kind: str, architecture: str, workshop: Workshop) -> None:
    """The loss is that of the run, and peft loads the adapter on the base model."""
    recipe = build_recipe(workshop, kind, architecture=architecture, save_model=True)
    record = workshop.run(recipe)
    evaluated = evaluate(recipe)
    assert evaluated.quality is not None
    assert record.quality is not None
    assert evaluated.quality.loss == record.quality.loss
    assert evaluated.parameters == record.parameters
    assert evaluated.phase_seconds["initialize"] == record.phase_seconds["initialize"]
    folder = workshop.output / "run" / "model"
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["init_lora_weights"], config["r"]) == (("eva", 4) if kind == "eva" else (True, 8))
    base = AutoModelForCausalLM.from_pretrained(workshop.base_folder(architecture), dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, folder)
    trained = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(tensor, get_peft_model_state_dict(model)[name]) for name, tensor in trained.items())
    path = str(workshop.output / "run")
    next_record = workshop.run(workshop.recipe(ZeroShot(), name="next", model={"path": path}))
    assert next_record.quality is not None
    assert next_record.quality.loss == pytest.approx(record.quality.loss, rel=1e-5)


def evaluate(recipe: Recipe) -> RunRecord:
    """Evaluate the saved model of a run, and return its new record."""
    reset_accelerators()
    with (
        use_small_matmul(),
        patch.object(initialization, "compute_initial_values", side_effect=AssertionError("a pass")),
    ):
        return Run(recipe, evaluate_only=True).execute()[0]


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adamw_bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_16_bits_start_at_the_loss_of_the_base(kind: str, optimizer: str, workshop: Workshop) -> None:
    """The trained weights keep the type of the optimizer, and only they are rounded."""
    parts: dict[str, Any] = {
        "architecture": "llama_untied",
        "model": {"dtype": "bf16"},
        "train": {"precision": "bf16"},
        "optimizer": {"kind": optimizer},
    }
    record = workshop.run(build_recipe(workshop, kind, **parts, name="data", save_model=True))
    plain = workshop.run(workshop.recipe(Lora(r=4), **parts))
    assert record.step_losses[0] == pytest.approx(plain.step_losses[0], rel=2e-2)
    dtypes = {tensor.dtype for tensor in load_file(workshop.output / "data/model/adapter_model.safetensors").values()}
    assert dtypes == {torch.bfloat16 if optimizer == "adamw_bf16" else torch.float32}


def test_loftq_corrects_the_error_of_the_quantization(workshop: Workshop, accelerator: Accelerator) -> None:
    """The factors of each matrix are the best ones of their rank, at any scale of LoRA."""
    from peftbench.training.build import apply_method, load_base_model

    method = METHOD_KINDS["loftq"].model_validate({"r": 16, "lora_alpha": 40})
    recipe = workshop.recipe(method, architecture="llama_untied", model={"quantization": "nf4"}, save_model=True)
    context = single_process_context(accelerator)
    adapted = apply_method(recipe, load_base_model(recipe), context)
    values = initialization.compute_initial_values(
        recipe, adapted, Dataset.from_list([]), context, pad_token_id=0, on_batch=lambda _: None
    )
    model: Any = initialization.set_initial_values(recipe, adapted, values).model
    original = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight: Any = original.get_submodule(name.removeprefix("base_model.model.")).weight
        packed = layer.get_base_layer().weight
        error = weight.detach() - dequantize_4bit(packed.data, packed.quant_state)
        rest = (error - layer.get_delta_weight("default").detach()).norm().item()
        assert rest == pytest.approx(torch.linalg.svdvals(error)[16:].norm().item(), rel=1e-4)
    record, evaluated = workshop.run(recipe), evaluate(recipe)
    assert record.phase_seconds["initialize"] > 0
    assert evaluated.quality is not None
    assert record.quality is not None
    assert evaluated.quality.loss == record.quality.loss


def test_loftq_is_refused_for_conv1d(workshop: Workshop) -> None:
    """Its matrices are stored transposed."""
    with pytest.raises(UnsupportedModelError, match="are stored transposed; use init_lora_weights=true"):
        workshop.run(build_recipe(workshop, "loftq", model={"quantization": "nf4"}))


@pytest.mark.parametrize("kind", [*KINDS, "loftq"])
def test_plan_is_refused(kind: str, workshop: Workshop) -> None:
    """The memory of the pass is measured in runs only."""
    model = {"quantization": "nf4"} if kind == "loftq" else {}
    recipe = build_recipe(workshop, kind, architecture="llama_untied", model=model)
    with (
        pytest.raises(EstimateUnavailableError, match="its initial values are computed before the first step"),
        MemorySimulation(recipe, get_device_facts("cpu").capability, 1),
    ):
        pass
