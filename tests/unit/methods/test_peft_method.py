"""Methods of peft as recipe sections: keys, defaults, replaced layers, merging, and learning rates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from peftbench.errors import OutOfRangeError, PeftbenchError, UnknownKeyError, UnsupportedModelError, WrongTypeError
from peftbench.methods import METHOD_KINDS
from peftbench.methods.linear_layers import has_conv1d, replace_conv1d, restore_conv1d
from peftbench.methods.peft_kinds import PRESETS
from peftbench.methods.small_copy import build_small_copy
from peftbench.recipe.loader import load_recipe, parse_recipe, to_commented_yaml
from peftbench.training.build import describe_rate
from peftbench.training.trial import try_method
from tests.helpers.models import gpt2_config, llama_config, meta_base
from tests.helpers.peft_types import build_method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECIPE: dict[str, Any] = {"name": "run", "data": {"source": {"kind": "docstrings"}}, "train": {"steps": 2}}
IDS = torch.arange(1, 13)[None]


def logits_of(model: Any) -> torch.Tensor:
    """Return the logits of a few tokens in evaluation mode."""
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ({"kind": "ia3", "target_module": ["a"]}, UnknownKeyError, "did you mean 'method.target_modules'?"),
        ({"kind": "peft", "type": "VERA", "dinitial": 1}, UnknownKeyError, "did you mean 'method.d_initial'?"),
        ({"kind": "iaa3"}, UnknownKeyError, "there is no method of kind 'iaa3'; did you mean 'ia3'?"),
        ({"kind": "ia3", "init_ia3_weights": 3}, WrongTypeError, "method.init_ia3_weights=3 has the wrong type"),
        ({"kind": "dora", "r": "8"}, WrongTypeError, "method.r='8' has the wrong type; it must be an integer"),
        ({"kind": "peft", "type": "VERRA"}, OutOfRangeError, "type=VERRA is not a type of peft; did you mean 'VERA'?"),
        (
            {"kind": "peft", "type": "LORA", "init_lora_weights": "evaa"},
            OutOfRangeError,
            "evaa is not an initialization; did you mean 'eva'?",
        ),
        ({"kind": "ia3", "target_modules": "*_proj"}, OutOfRangeError, "invalid regular expression"),
        ({"kind": "dora", "layers_to_transform": [1]}, OutOfRangeError, "peft ignores layers_to_transform with"),
        ({"kind": "peft"}, PeftbenchError, "method.type is missing; set it"),
    ],
)
def test_mistake_in_a_key_of_peft_is_one_sentence(
    method: dict[str, Any], error: type[PeftbenchError], message: str
) -> None:
    """The message has the key, what is allowed, and the nearest name."""
    with pytest.raises(error) as raised:
        parse_recipe(RECIPE | {"method": method})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_kind_peft_and_its_preset_have_the_same_keys() -> None:
    """The type is read in any case, and a variant of LoRA has the defaults of lora."""
    preset = parse_recipe(RECIPE | {"method": {"kind": "ia3"}}).method.model_dump()
    by_type = parse_recipe(RECIPE | {"method": {"kind": "peft", "type": "ia3"}}).method.model_dump()
    assert by_type | {"kind": "ia3"} == preset | {"type": "IA3"}
    dora = parse_recipe(RECIPE | {"method": {"kind": "dora"}}).method.model_dump()
    lora = METHOD_KINDS["lora"].model_validate({"kind": "lora"}).model_dump()
    assert {key: dora[key] for key in lora if key not in {"kind", "use_dora"}} == {
        key: value for key, value in lora.items() if key not in {"kind", "use_dora"}
    }
    assert dora["use_dora"]


@pytest.mark.parametrize("kind", sorted(PRESETS))
def test_section_is_printed_and_read_again(kind: str, tmp_path: Path) -> None:
    """Every key has a description, and the printed recipe is the same recipe."""
    recipe = parse_recipe(RECIPE | {"method": {"kind": kind}})
    file = tmp_path / "recipe.yaml"
    file.write_text(to_commented_yaml(recipe), encoding="utf-8")
    assert load_recipe([file]) == recipe
    assert all(field.description for field in METHOD_KINDS[kind].model_fields.values())


def test_other_kind_drops_keys_that_it_lacks(tmp_path: Path) -> None:
    """A recipe of one method can be run with another."""
    file = tmp_path / "recipe.yaml"
    file.write_text(to_commented_yaml(parse_recipe(RECIPE | {"method": {"kind": "vera", "r": 4}})), encoding="utf-8")
    assert load_recipe([file], ["method.kind=ia3"]).method == METHOD_KINDS["ia3"].model_validate({})
    by_type = load_recipe([file], ["method={kind: peft, type: OFT}"]).method
    assert by_type.model_dump()["type"] == "OFT"


def test_every_block_of_a_deep_model_is_adapted() -> None:
    """The search on a copy with two layers does not limit the layers: dora trains LoRA's matrices and magnitudes."""
    config = llama_config(num_hidden_layers=5)
    dora, lora = METHOD_KINDS["dora"].model_validate({"r": 4}), METHOD_KINDS["lora"].model_validate({"r": 4})
    base = meta_base(config)
    outputs = 5 * sum(
        module.out_features for _, module in base.model.layers[0].named_modules() if isinstance(module, torch.nn.Linear)
    )
    assert dora.trainable_parameters(base) == lora.trainable_parameters(meta_base(config)) + outputs
    beft = build_method("BEFT", target_modules="all-linear").apply(meta_base(config), None)  # type: ignore[arg-type]
    trained = {name.split(".layers.")[1][0] for name, p in beft.named_parameters() if p.requires_grad}
    assert trained == set("01234")


@pytest.mark.parametrize(
    ("kind", "keys", "layers"),
    [
        ("peft", {"type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": [3, 4]}, "34"),
        ("ia3", {"target_modules": r".*layers\.[34]\..*k_proj", "feedforward_modules": []}, "34"),
        ("adaption_prompt", {"adapter_layers": 3, "adapter_len": 2}, "234"),
    ],
)
def test_keys_about_layers_are_those_of_the_model(kind: str, keys: dict[str, Any], layers: str) -> None:
    """A layer that a small copy would lack is adapted, and the method can be tried."""
    config = llama_config(num_hidden_layers=5)
    method = parse_recipe(RECIPE | {"method": {"kind": kind} | keys}).method
    assert try_method(method, config).trainable_parameters > 0
    model = method.apply(meta_base(config), None)  # type: ignore[arg-type]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".layers.")[1][0] for name in names} == set(layers)


@pytest.mark.parametrize("index", [5, 3000])
def test_named_tokens_are_tried(index: int) -> None:
    """A token that a small vocabulary would lack, and one that a fixed text would lack."""
    method = build_method("TRAINABLE_TOKENS", token_indices=(index,))
    assert try_method(method, llama_config()).trainable_parameters == 64


def test_replaced_layers_compute_the_same_and_are_restored() -> None:
    """Logits do not change, and the restored model has the original tensors' values."""
    model = build_small_copy(gpt2_config())
    before, expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits_of(model)
    names = replace_conv1d(model)
    assert len(names) == 8
    assert not has_conv1d(model)
    assert torch.allclose(logits_of(model), expected, atol=1e-5)
    restore_conv1d(model, names)
    assert sum(isinstance(module, Conv1D) for module in model.modules()) == 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_merged_model_with_replaced_layers_loads_elsewhere(tmp_path: Path) -> None:
    """Transformers loads the merged GPT-2 with the logits of the adapter."""
    method, base = build_method("OFT"), build_small_copy(gpt2_config())
    model = method.apply(base, None)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    expected = logits_of(model)
    merged: PreTrainedModel = method.merge(model)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (logits_of(loaded) - expected).norm() < 1e-4 * expected.norm()


def test_trial_changes_no_random_state() -> None:
    """Initial values depend on the seed alone, whether or not a method was tried before."""
    method, values = build_method("LORA", r=3), []
    for _ in range(2):
        torch.manual_seed(5)
        model = method.apply(build_small_copy(llama_config()), None)  # type: ignore[arg-type]
        values.append([parameter.clone() for parameter in model.parameters() if parameter.requires_grad])
        try_method(method, llama_config())
    assert all(torch.equal(first, second) for first, second in zip(*values, strict=True))


def test_parameters_without_gradient_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter that is not used in the forward pass."""
    method = build_method("IA3")
    apply = type(method).apply

    def add_unused(self: Any, base: Any, tokenizer: Any) -> Any:
        model = apply(self, base, tokenizer)
        model.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
        return model

    monkeypatch.setattr(type(method), "apply", add_unused)
    with pytest.raises(UnsupportedModelError, match=r"trains parameters that the loss does not depend on.*unused"):
        try_method(method, llama_config(hidden_size=32))


@pytest.mark.parametrize(("rate", "noted"), [(1e-4, False), (5e-3, False), (1e-5, True), (1e-2, True)])
def test_rate_outside_the_known_range_is_noted(rate: float, noted: bool) -> None:
    """The note has the rate, the range and its source."""
    recipe = parse_recipe(RECIPE | {"method": {"kind": "ia3"}, "optimizer": {"learning_rate": rate}})
    notes = describe_rate(recipe)
    assert bool(notes) == noted
    assert all("known for ia3: 0.0001 to 0.005 (" in note and "arXiv:2205.05638" in note for note in notes)


def test_olora_replaces_layers_that_it_takes_for_transposed_ones() -> None:
    """Peft applies OLoRA to Conv1D, and the forward pass then fails."""
    method = METHOD_KINDS["olora"].model_validate({})
    assert method.resolve_targets(gpt2_config()).needs_linear  # type: ignore[attr-defined]
    assert try_method(method, gpt2_config()).trainable_parameters > 0
