"""model.dtype: frozen weights are held in 16 bits, and trained weights and buffers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from peftbench.distributed.accelerator import build_accelerator
from peftbench.distributed.device_capability import DeviceCapability
from peftbench.distributed.engines import ENGINES, SINGLE
from peftbench.errors import CombinationError
from peftbench.feature_cache.key import build_cache_key
from peftbench.methods.base import Method
from peftbench.methods.baselines import Lead, ZeroShot
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.recipe.loader import load_recipe
from peftbench.recipe.schema import Recipe
from peftbench.run.runner import Run
from peftbench.training.auto_settings import resolve_auto_settings
from peftbench.training.build import AdaptedModel, load_base_model
from tests.helpers.models import embeddings_of, head_of
from tests.helpers.short_runs import use_small_matmul
from tests.helpers.training import build_adapted_model, reset_accelerators, trainable_parameters
from tests.helpers.workshop import Workshop

FREEZING: dict[str, Method] = {
    "lora": Lora(r=4),
    "lora, biases": Lora(r=4, bias="all"),
    "lora, DoRA": Lora(r=4, use_dora=True),
    "prompt_tuning": PromptTuning(num_virtual_tokens=5),
    "last_layer": LastLayer(),
    "last_layer, tied": LastLayer(head="tied"),
    "zero_shot": ZeroShot(),
}
every_freezing_method = pytest.mark.parametrize("method", FREEZING.values(), ids=FREEZING)


def bf16_recipe(workshop: Workshop, method: Method, dtype: str = "auto", **parts: Any) -> Recipe:
    """Return a recipe with train.precision=bf16."""
    model = {"dtype": dtype} | parts.pop("model", {})
    return workshop.recipe(method, model=model, train={"precision": "bf16"} | parts.pop("train", {}), **parts)


def adapt(workshop: Workshop, recipe: Recipe) -> AdaptedModel:
    """Return the adapted model of ``recipe``."""
    reset_accelerators()
    return build_adapted_model(recipe, build_accelerator(recipe, workshop.output).accelerator)


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters without a gradient."""
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}


@every_freezing_method
@pytest.mark.parametrize("architecture", ["gpt2_tied", "llama_tied"])
def test_frozen_weights_are_in_16_bits(method: Method, architecture: str, workshop: Workshop) -> None:
    """Embeddings, head, norms and matrices are; trained weights and rotary frequencies are in float32."""
    built = adapt(workshop, bf16_recipe(workshop, method, architecture=architecture))
    frozen = frozen_parameters(built.model)
    assert {weight.dtype for weight in trainable_parameters(built.model).values()} <= {torch.float32}
    assert {weight.dtype for weight in frozen.values() if weight.ndim > 1} == {torch.bfloat16}
    assert {buffer.dtype for buffer in built.model.buffers()} <= {torch.float32}
    trains_embedding = embeddings_of(built.base.model).requires_grad
    vectors = {weight.dtype for weight in frozen.values() if weight.ndim == 1}
    if isinstance(method, Lora) and method.bias == "all" and architecture == "gpt2_tied":
        assert vectors == {torch.float32}  # every vector is trained, or scales a normalization with a trained bias
    else:
        assert vectors == {torch.float32 if trains_embedding else torch.bfloat16}
    trained = ", and trained ones in fp32" if method.is_trainable else ""
    assert f"frozen weights are held in bf16 (model.dtype){trained}" in built.notes


@every_freezing_method
def test_float32_is_kept_where_it_was_asked_for(method: Method, workshop: Workshop) -> None:
    """Under model.dtype=fp32 and under train.precision=fp32 every weight is float32, and no note is made."""
    for keys in ({"dtype": "fp32"}, {"train": {"precision": "fp32"}}):
        built = adapt(workshop, bf16_recipe(workshop, method, **keys))  # type: ignore[arg-type]
        assert {parameter.dtype for parameter in built.model.parameters()} == {torch.float32}
        assert not [note for note in built.notes if "model.dtype" in note]


@pytest.mark.parametrize("method", [Lora(r=4), PromptTuning(num_virtual_tokens=5), LastLayer()], ids=lambda m: m.kind)
def test_losses_differ_by_rounding_only(method: Method, workshop: Workshop) -> None:
    """Three training losses and the evaluation loss are close to those over a float32 base, and not equal."""
    runs = [workshop.run(bf16_recipe(workshop, method, dtype)) for dtype in ("fp32", "bf16")]
    wide, narrow = (run.step_losses for run in runs)
    assert wide != narrow
    assert narrow == pytest.approx(wide, rel=0.02)
    assert runs[1].recipe["model"]["dtype"] == "bf16"
    assert all(run.quality is not None for run in runs)


@pytest.mark.parametrize("method", [Lora(r=4), Lora(r=4, use_dora=True), LastLayer(), PromptTuning()])
def test_initial_trained_weights_do_not_depend_on_the_type(method: Method, workshop: Workshop) -> None:
    """They are neither rounded nor drawn differently; DoRA's magnitudes are those of the rounded matrices."""
    wide, narrow = (
        trainable_parameters(adapt(workshop, bf16_recipe(workshop, method, dtype)).model) for dtype in ("fp32", "bf16")
    )
    assert wide.keys() == narrow.keys()
    for name, weight in wide.items():
        tolerance = 0.01 if "magnitude" in name else 0.0
        torch.testing.assert_close(narrow[name], weight, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_trained_head_starts_from_the_values_in_the_file(head: Any, workshop: Workshop) -> None:
    """A head that is trained is loaded in float32, so that it loses no digits."""
    recipe = bf16_recipe(workshop, LastLayer(head=head))
    stored = load_file(Path(recipe.model.path) / "model.safetensors")["transformer.wte.weight"]
    built = adapt(workshop, recipe)
    assert stored.dtype == torch.float32
    assert not torch.equal(stored, stored.bfloat16().float())
    assert torch.equal(head_of(built.base.model), stored)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        (Lora(), torch.bfloat16),
        (Lora(bias="all"), torch.float32),
        (LastLayer(), torch.float32),
        (Full(), torch.float32),
    ],
)
def test_base_is_loaded_in_16_bits_if_none_of_it_is_trained(
    method: Method, dtype: torch.dtype, workshop: Workshop
) -> None:
    """So the host never holds it in float32; buffers are float32 all the same."""
    base = load_base_model(bf16_recipe(workshop, method, architecture="llama_tied")).model
    assert {parameter.dtype for parameter in base.parameters()} == {dtype}
    assert {buffer.dtype for buffer in base.buffers()} == {torch.float32}


def test_random_weights_are_the_same_numbers_in_every_type(workshop: Workshop) -> None:
    """They are drawn in float32 and rounded, so that methods start from the same base."""
    full, lora = (
        embeddings_of(adapt(workshop, bf16_recipe(workshop, method, model={"init": "random"})).base.model)
        for method in (Full(), Lora(r=4))
    )
    assert torch.equal(full.bfloat16(), lora)


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("nf4_double", marks=pytest.mark.slow), "int8"])
def test_unquantized_weights_of_a_quantized_base_are_in_16_bits(quantization: str, workshop: Workshop) -> None:
    """Embedding, head and norms are; adapters are float32, and the loss is close to that over float32."""
    recipes = [
        bf16_recipe(workshop, Lora(r=4), dtype, architecture="llama_untied", model={"quantization": quantization})
        for dtype in ("fp32", "bf16")
    ]
    model = adapt(workshop, recipes[1]).model
    unpacked = [weight for name, weight in frozen_parameters(model).items() if "proj.base_layer.weight" not in name]
    assert {weight.dtype for weight in unpacked} == {torch.bfloat16}
    assert {weight.dtype for weight in trainable_parameters(model).values()} == {torch.float32}
    wide, narrow = (workshop.run(recipe).step_losses for recipe in recipes)
    assert narrow == pytest.approx(wide, rel=0.03)


def resolve(recipe: Recipe, *, has_bf16: bool = True) -> Recipe:
    """Return ``recipe`` resolved for a CPU."""
    return resolve_auto_settings(recipe, SINGLE, DeviceCapability("cpu", has_bf16=has_bf16))[0]


def test_auto_follows_the_precision(workshop: Workshop) -> None:
    """It is the type that train.precision resolves to, whether that is given or auto itself."""
    for precision, has_bf16, expected in (
        ("bf16", False, "bf16"),
        ("fp16", True, "fp16"),
        ("fp32", True, "fp32"),
        ("auto", True, "bf16"),
        ("auto", False, "fp32"),
    ):
        recipe = workshop.recipe(Lora(), train={"precision": precision})
        assert resolve(recipe, has_bf16=has_bf16).model.dtype == expected
    assert resolve(bf16_recipe(workshop, Lora(), "fp32")).model.dtype == "fp32"


def test_auto_is_float32_where_weights_are_swapped_to_disk(workshop: Workshop) -> None:
    """DeepSpeed's buffers have one type, which would round trained weights; the record has the reason."""
    recipe, notes = resolve_auto_settings(
        bf16_recipe(workshop, Lora()), ENGINES["zero3_nvme"], DeviceCapability("cpu", has_bf16=True)
    )
    assert recipe.model.dtype == "fp32"
    assert "model.dtype is fp32 (DeepSpeed swaps all weights to disk through buffers of one type)" in notes[0]


@pytest.mark.parametrize("method", [Full(), Lead()], ids=lambda method: method.kind)
def test_method_without_frozen_weights_ignores_the_key(method: Method, workshop: Workshop) -> None:
    """It resolves to fp32, whatever is given, so that the fingerprint is one for all values."""
    resolved = [resolve(bf16_recipe(workshop, method, dtype)) for dtype in ("auto", "fp32", "bf16", "fp16")]
    assert {recipe.model.dtype for recipe in resolved} == {"fp32"}
    assert len({recipe.fingerprint() for recipe in resolved}) == 1


def test_type_changes_the_fingerprint_of_a_frozen_base(workshop: Workshop) -> None:
    """Recipes that differ in the resolved type alone are not the same run."""
    assert (
        resolve(bf16_recipe(workshop, Lora())).fingerprint()
        == resolve(bf16_recipe(workshop, Lora(), "bf16")).fingerprint()
    )
    assert (
        resolve(bf16_recipe(workshop, Lora())).fingerprint()
        != resolve(bf16_recipe(workshop, Lora(), "fp32")).fingerprint()
    )


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "bf16"), ("bf16", "fp16")])
def test_type_that_differs_from_the_precision_is_refused(precision: str, dtype: str, workshop: Workshop) -> None:
    """The error has the reason and the change that runs."""
    recipe = workshop.recipe(Lora(), model={"dtype": dtype}, train={"precision": precision})
    reason = rf"model.dtype={dtype} does not run: weights frozen in {dtype} are multiplied in {dtype}.*model.dtype=auto"
    with pytest.raises(CombinationError, match=reason):
        build_accelerator(recipe, workshop.output)


def test_record_from_before_the_key_is_repeated_in_float32(workshop: Workshop) -> None:
    """A recorded recipe without model.dtype ran over a float32 base, which its default would not."""
    record = workshop.run(bf16_recipe(workshop, Lora(r=4), "fp32"))
    values = record.model_dump(mode="json")
    del values["recipe"]["model"]["dtype"]
    file = workshop.output / "old.json"
    file.write_text(record.model_copy(update={"recipe": values["recipe"]}).model_dump_json(), encoding="utf-8")
    repeated = load_recipe([file])
    assert repeated.model.dtype == "fp32"
    assert repeated.fingerprint() == record.recipe_fingerprint


def test_feature_cache_key_depends_on_the_type(workshop: Workshop) -> None:
    """Features of a rounded backbone are not those of the float32 one."""
    keys = []
    for dtype in ("fp32", "bf16"):
        recipe = bf16_recipe(workshop, LastLayer(), dtype, train={"feature_cache": "bf16"})
        adapted = adapt(workshop, recipe)
        base, part = adapted.base.model, adapted.frozen_part
        keys.append(build_cache_key(recipe, base, part, "e", torch.device("cpu"), uses_masks=False))
    assert keys[0]["weights"] != keys[1]["weights"]


def test_cached_features_give_the_losses_of_recomputed_ones(
    workshop: Workshop, tmp_path: Path, monkeypatch: Any
) -> None:
    """Two epochs over a 16-bit backbone, the second one from the cache."""
    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path))
    losses = [
        workshop.run(bf16_recipe(workshop, LastLayer(), train={"feature_cache": cache, "steps": 8})).step_losses
        for cache in (None, "bf16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("method", [Lora(r=4), LastLayer(), LastLayer(head="tied")], ids=["lora", "untied", "tied"])
def test_saved_model_is_reloaded_to_the_same_values(method: Method, workshop: Workshop) -> None:
    """Its evaluation repeats to the last digit, and transformers loads every trained weight unrounded."""
    recipe = bf16_recipe(workshop, method, save_model=True)
    trained = workshop.run(recipe)
    reset_accelerators()
    with use_small_matmul():
        evaluated, _ = Run(recipe, evaluate_only=True).execute()
    assert trained.quality is not None
    assert evaluated.quality is not None
    assert evaluated.quality.loss == trained.quality.loss
    folder = workshop.output / "run" / "model"
    if isinstance(method, LastLayer):
        weights = load_file(folder / "model.safetensors")
        dtypes = {tensor.dtype for tensor in weights.values()}
        assert dtypes == {torch.bfloat16, torch.float32}
        loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in weights.items())
