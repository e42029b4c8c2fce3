"""Checks and repairs of a base model when it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftbench.errors import DiskFullError, ModelError, PeftbenchError, UnsupportedModelError
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.modeling.loading import load_model
from peftbench.recipe.schema import Model
from tests.helpers.architectures import PLAIN, build_tiny_model
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@pytest.fixture
def folder(base_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """Return a copy of a small base model's folder, to damage."""
    return Path(shutil.copytree(base_folder("gpt2_tied"), tmp_path / "base"))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Apply ``change`` to the weights in a folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_json(folder: Path, name: str, **keys: Any) -> None:
    """Replace keys in one of a folder's JSON files."""
    path = folder / name
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(values | keys), encoding="utf-8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight", "transformer.ln_f.bias"])
def test_weights_that_are_not_finite_are_refused(name: str, value: float, folder: Path) -> None:
    """The sentence names the tensor and the number of bad values."""

    def damage(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(-1)[3:5] = value

    change_weights(folder, damage)
    with pytest.raises(ModelError, match=f"{name} in .* has 2 values that are NaN or infinite"):
        load_model(Model(path=str(folder), attention="sdpa"))


def test_large_weights_are_finite(folder: Path) -> None:
    """Weights whose sum overflows are accepted."""

    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        weights["transformer.h.1.mlp.c_fc.weight"][:] = 3e38

    change_weights(folder, enlarge)
    loaded = load_model(Model(path=str(folder), attention="sdpa")).model
    assert bool(loaded.get_parameter("transformer.h.1.mlp.c_fc.weight").eq(3e38).all())


def test_weights_without_a_place_are_refused(folder: Path) -> None:
    """A config with fewer layers than the weights would train another model."""
    change_json(folder, "config.json", n_layer=1)
    with pytest.raises(
        ModelError, match=r"the weights in .* have \d+ tensors that config\.json does not describe, e\.g\. trans"
    ):
        load_model(Model(path=str(folder), attention="sdpa"))


@pytest.mark.parametrize("name", ["adapter.weight", "transformer.h.7.ln_1.weight", "classifier.bias"])
def test_additional_weights_are_refused(name: str, folder: Path) -> None:
    """Tensors that no module has are named."""
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(64)}))
    with pytest.raises(ModelError, match=f"have 1 tensors that config.json does not describe, e.g. {name}"):
        load_model(Model(path=str(folder), attention="sdpa"))


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.0.attn.bias",
        "transformer.h.0.attn.masked_bias",
        "transformer.h.1.attention.bias",
        "layers.0.self_attn.rotary_emb.inv_freq",
        "embeddings.position_ids",
    ],
)
def test_buffers_of_old_versions_are_ignored(name: str, folder: Path) -> None:
    """Checkpoints on the Hub, GPT-2's among them, have buffers that a model computes itself."""
    expected = load_model(Model(path=str(folder), attention="sdpa")).model.state_dict()
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(1, 1, 4, 4)}))
    loaded = load_model(Model(path=str(folder), attention="sdpa")).model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize("added", [1, 2, 100])
def test_tokenizer_larger_than_the_embedding_is_refused(
    added: int, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Both numbers are in the sentence, in a run and in an estimate."""
    from peftbench.memory.simulation.model import build_meta_model

    larger = type(tokenizer).from_pretrained(folder)
    larger.add_tokens([f"<extra-{number}>" for number in range(added)])
    larger.save_pretrained(folder)
    sentence = rf"the tokenizer of .* has {4096 + added:,} tokens, but the model's embedding has 4,096 rows"
    with pytest.raises(ModelError, match=sentence):
        load_model(Model(path=str(folder), attention="sdpa"))
    with pytest.raises(ModelError, match=sentence):
        build_meta_model(Model(path=str(folder), attention="sdpa"), torch.float32)


def test_embedding_larger_than_the_tokenizer_is_accepted(folder: Path) -> None:
    """Embeddings are often padded to a multiple of 64 or 128."""

    def pad(weights: dict[str, torch.Tensor]) -> None:
        weights["transformer.wte.weight"] = torch.cat((weights["transformer.wte.weight"], torch.zeros(64, 64)))

    change_weights(folder, pad)
    change_json(folder, "config.json", vocab_size=4160)
    loaded = load_model(Model(path=str(folder), attention="sdpa"))
    assert (loaded.model.config.vocab_size, len(loaded.tokenizer)) == (4160, 4096)


def test_special_tokens_beyond_the_embedding_are_accepted(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Text never becomes one, e.g. the tokens of images; an end token beyond the embedding is refused."""
    larger = type(tokenizer).from_pretrained(folder)
    larger.add_special_tokens({"additional_special_tokens": ["<image>"]})
    larger.save_pretrained(folder)
    assert len(load_model(Model(path=str(folder), attention="sdpa")).tokenizer) == 4097
    larger.add_special_tokens({"eos_token": "<end>"})
    larger.save_pretrained(folder)
    with pytest.raises(ModelError, match="the model's embedding has 4,096 rows"):
        load_model(Model(path=str(folder), attention="sdpa"))


@pytest.mark.parametrize("quantization", ["nf4", "nf4_double", "int8"])
def test_nan_is_found_in_quantized_weights(quantization: str, folder: Path) -> None:
    """The scales of a matrix are NaN where its weights were."""

    def damage(weights: dict[str, torch.Tensor]) -> None:
        weights["transformer.h.1.mlp.c_fc.weight"][0, 0] = float("nan")

    change_weights(folder, damage)
    with pytest.raises(ModelError, match="NaN or infinite"):
        load_model(Model(path=str(folder), attention="sdpa", quantization=quantization))


@pytest.mark.parametrize("removed", ["tokenizer.json", "tokenizer*"])
def test_folder_without_a_tokenizer_is_refused(removed: str, folder: Path) -> None:
    """It is refused before the weights are loaded, and the sentence names the tokenizer."""
    for path in folder.glob(removed):
        path.unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(PeftbenchError, match="tokenizer"):
        load_model(Model(path=str(folder), attention="sdpa"))


@pytest.mark.parametrize(
    ("settings", "set_aside"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, ["temperature=0.9", "top_p=0.6"]),
        ({"top_k": 10}, ["top_k=10"]),
        ({"length_penalty": 2.0, "num_beams": 1}, ["length_penalty=2.0"]),
        ({"min_p": 0.1, "do_sample": False}, ["min_p=0.1"]),
    ],
)
def test_generation_config_is_repaired(
    settings: dict[str, Any], set_aside: list[str], folder: Path, workshop: Workshop
) -> None:
    """Transformers refuses to save it: the saved one lacks the faulty settings, and one note names them."""
    from transformers import AutoModelForCausalLM

    change_json(folder, "generation_config.json", **settings)
    record = workshop.run(workshop.recipe(Full(), model={"path": str(folder)}, save_model=True))
    assert record.outcome.kind == "ok"
    (note,) = [note for note in record.notes if "generation_config.json" in note]
    assert all(setting in note for setting in set_aside)
    saved = AutoModelForCausalLM.from_pretrained(workshop.output / "run" / "model").generation_config
    assert all(getattr(saved, setting.partition("=")[0]) is None for setting in set_aside)
    assert saved.eos_token_id == 0


@pytest.mark.parametrize("settings", [{"do_sample": True, "temperature": 0.9, "top_p": 0.6}, {"num_beams": 4}])
def test_valid_generation_config_is_kept(settings: dict[str, Any], folder: Path, workshop: Workshop) -> None:
    """The saved model has the settings of its base."""
    change_json(folder, "generation_config.json", **settings)
    record = workshop.run(workshop.recipe(Full(), model={"path": str(folder)}, save_model=True))
    assert record.notes == ()
    path = workshop.output / "run" / "model" / "generation_config.json"
    assert settings.items() <= json.loads(path.read_text(encoding="utf-8")).items()


GENERATION_SETTINGS: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 5.0},
    {"no_repeat_ngram_size": 1},
    {"do_sample": True, "temperature": 100.0},
    {"suppress_tokens": list(range(1, 4000))},
    {"num_beams": 4, "length_penalty": -5.0},
)


@pytest.mark.parametrize("method", [Full(), Lora(r=2), PromptTuning(num_virtual_tokens=4)], ids=lambda m: m.kind)
def test_generation_ignores_settings_of_the_base(
    method: Full | Lora | PromptTuning, folder: Path, workshop: Workshop
) -> None:
    """Greedy decoding is greedy whatever the base's generation_config, and a note names what is not used."""
    keys: dict[str, Any] = {"evaluate": {"metrics": None, "saved_samples": 8}, "train": {"steps": 1}}
    plain = workshop.run(workshop.recipe(method, model={"path": str(folder)}, **keys))
    assert plain.quality is not None
    assert plain.notes == ()
    plain_config = (folder / "generation_config.json").read_bytes()
    for settings in GENERATION_SETTINGS:
        (folder / "generation_config.json").write_bytes(plain_config)
        change_json(folder, "generation_config.json", **settings)
        record = workshop.run(workshop.recipe(method, model={"path": str(folder)}, **keys))
        assert record.quality is not None
        assert record.quality.samples == plain.quality.samples, settings
        (note,) = [note for note in record.notes if "generation does not use" in note]
        assert all(key in note for key in settings), note


@pytest.mark.parametrize("case", ["ctrl", "openai-gpt", "falcon_h1"])
def test_prompt_tuning_is_refused_where_generation_takes_no_embeddings(case: str) -> None:
    """It is refused before the training; without generation it is accepted."""
    with pytest.raises(UnsupportedModelError, match=r"generates only from token ids.* set evaluate\.metrics=\[\]"):
        PromptTuning().check_generation(build_tiny_model(case))


@pytest.mark.parametrize("case", ["gpt2", "llama", "opt"])
def test_prompt_tuning_is_accepted_where_generation_takes_embeddings(case: str) -> None:
    """No error is raised."""
    PromptTuning().check_generation(build_tiny_model(case))


@pytest.mark.parametrize(("method", "size"), [(Full(), "1 MiB"), (Lora(r=2), "16 KiB")], ids=["full", "lora"])
def test_disk_too_full_for_the_model_is_refused_before_training(
    method: Full | Lora, size: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sizes are in the sentence, and nothing is written; without a saved model the run starts."""
    usage = shutil.disk_usage(workshop.output)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5000))
    with pytest.raises(DiskFullError, match=f"the trained model needs {size}, but the disk of .* has 5 KiB left"):
        workshop.run(workshop.recipe(method, save_model=True))
    assert not (workshop.output / "run").exists()
    assert workshop.run(workshop.recipe(method)).outcome.kind == "ok"


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("architecture", ["gpt2_tied", "llama_tied"])
def test_head_that_config_wrongly_ties_is_noted(
    architecture: str, shift: float, base_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A head with values of its own is loaded, noted and saved; an equal one is tied."""
    folder, saved = Path(shutil.copytree(base_folder(architecture), tmp_path / "base")), tmp_path / "saved"

    def add_head(weights: dict[str, torch.Tensor]) -> None:
        (embedding,) = (tensor for name, tensor in weights.items() if "wte" in name or "embed_tokens" in name)
        weights["lm_head.weight"] = embedding + shift

    change_weights(folder, add_head)
    base = load_model(Model(path=str(folder)))
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    note = "config.json ties lm_head.weight to the embedding, but the weights have other values for it"
    assert [text.startswith(note) for text in base.notes] == ([True] if shift else [])
    assert (base.model.lm_head.weight is base.model.get_input_embeddings().weight) == (shift == 0)  # type: ignore[union-attr]
    base.model.save_pretrained(saved)
    base.tokenizer.save_pretrained(saved)
    again = load_model(Model(path=str(saved)))
    assert again.notes == ()
    assert torch.equal(again.model.lm_head.weight, head)  # type: ignore[arg-type,union-attr]


TEXT_PART = PLAIN | {"vocab_size": 4096, "head_dim": 8}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "llama4": {
        "text_config": TEXT_PART | {"intermediate_size_mlp": 48, "num_local_experts": 2},
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vision_output_dim": 32,
            "image_size": 28,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    },
    "qwen3_5": {
        "text_config": TEXT_PART,
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
        },
    },
}
"""Small multimodal models whose text model transformers loads on its own."""


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_text_model_of_a_multimodal_folder_is_loaded(
    kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Its weights are those of the whole model, images need no place, and a text weight without one is refused."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    whole = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **MULTIMODAL[kind]))
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    loaded = load_model(Model(path=str(tmp_path))).model.state_dict()
    assert {name for name in stored if "vision" in name or "visual" in name}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= loaded.keys()
    language_model = whole.model.language_model if kind == "qwen3_5" else whole.language_model.model
    for name, tensor in language_model.state_dict().items():
        assert torch.equal(loaded[f"model.{name}"], tensor)
    head = next(tensor for name, tensor in stored.items() if name.endswith("lm_head.weight"))
    assert torch.equal(loaded["lm_head.weight"], head)
    prefix = next(name for name in stored if ".layers.0." in name and "language_model" in name).split("layers.0.")[0]
    change_weights(tmp_path, lambda weights: weights.update({f"{prefix}layers.7.norm.weight": torch.zeros(2)}))
    with pytest.raises(ModelError, match=r"have 1 tensors that config.json does not describe, e.g. .*layers\.7\.norm"):
        load_model(Model(path=str(tmp_path)))
