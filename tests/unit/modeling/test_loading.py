"""Loading a base model: float32 weights, its fingerprint, the keys of the recipe, and one-sentence errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from peftbench import shipped
from peftbench.errors import (
    HubUnreachableError,
    ModelNotFoundError,
    OutOfRangeError,
    PeftbenchError,
    UnsupportedModelError,
)
from peftbench.modeling import loading
from peftbench.modeling.attention import sdpa_attention
from peftbench.recipe.schema import Model
from peftbench.record import read_record
from tests.helpers.methods import every_architecture
from tests.helpers.models import ARCHITECTURES, POSITIONS, gpt2_config, llama_config
from tests.helpers.paths import REPOSITORY

Folder = Callable[[str], Path]


@pytest.fixture
def folder_copy(base_folder: Folder, tmp_path: Path) -> Path:
    """Return a copy of an untied Llama's folder, which a test may modify."""
    return Path(shutil.copytree(base_folder("llama_untied"), tmp_path / "base"))


@every_architecture
def test_folder_is_loaded_in_float32(architecture: str, base_folder: Folder) -> None:
    """Weights equal the saved ones, the KV cache is disabled, and the folder's tokenizer is loaded."""
    base = loading.load_model(Model(path=str(base_folder(architecture))))
    saved = load_file(base_folder(architecture) / "model.safetensors")
    loaded = base.model.state_dict()
    assert saved
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}
    assert base.model.config.use_cache is False
    assert base.max_positions == POSITIONS
    assert base.tokenizer("a bridge")["input_ids"]
    assert base.model.generation_config.pad_token_id is not None


def test_loaded_model_uses_the_attention_that_repeats_keys(base_folder: Folder) -> None:
    """Generation and models with their own masks reach it by the name sdpa."""
    loading.load_model(Model(path=str(base_folder("llama_tied"))))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention


def test_bundled_model_is_loaded_by_its_name() -> None:
    """Its weights are float32, whatever their stored dtype, and its fingerprint is a hash of them."""
    base = loading.load_model(Model(path=shipped.SHIPPED_MODEL))
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}
    assert base.fingerprint.startswith("blake2b ")
    assert base.model.get_input_embeddings().weight.shape[0] >= len(base.tokenizer)  # type: ignore[union-attr,index]


@every_architecture
def test_random_weights_depend_on_the_seed(architecture: str, base_folder: Folder) -> None:
    """With init=random no saved weight is used, and the fingerprint states that the weights are random."""
    model = Model(path=str(base_folder(architecture)), init="random")
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        base = loading.load_model(model)
        weights.append(base.model.get_input_embeddings().weight.detach())  # type: ignore[operator,union-attr]
    assert base.fingerprint == "random weights"
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], loading.load_model(Model(path=model.path)).model.get_input_embeddings().weight)  # type: ignore[arg-type]


def test_random_weights_need_only_a_config(folder_copy: Path) -> None:
    """A folder without weights is loaded with init=random."""
    (folder_copy / "model.safetensors").unlink()
    assert loading.load_model(Model(path=str(folder_copy), init="random")).fingerprint == "random weights"


def test_fingerprint_depends_on_the_weights(folder_copy: Path, base_folder: Folder) -> None:
    """Two folders with equal weights have the same fingerprint; a change of one value changes it."""
    original = loading.load_model(Model(path=str(base_folder("llama_untied")))).fingerprint
    assert loading.load_model(Model(path=str(folder_copy))).fingerprint == original
    weights = load_file(folder_copy / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder_copy / "model.safetensors", metadata={"format": "pt"})
    assert loading.load_model(Model(path=str(folder_copy))).fingerprint != original


@pytest.mark.parametrize(
    ("keys", "changes"),
    [
        ({"rope_theta": 777.0}, True),
        ({"rms_norm_eps": 1e-3}, True),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}, True),
        ({"_name_or_path": "x", "transformers_version": "0", "torch_dtype": "float16", "dtype": "float16"}, False),
        ({"text_config": {"dtype": "float16"}}, True),
    ],
)
def test_config_fingerprint_depends_on_values_that_change_a_number(
    keys: dict[str, Any], changes: bool, folder_copy: Path
) -> None:
    """The weights keep theirs, so that records from before it existed stay valid."""
    model, file = Model(path=str(folder_copy)), folder_copy / "config.json"
    before = loading.read_base_fingerprint(model), loading.compute_config_fingerprint(model)
    file.write_text(json.dumps(json.loads(file.read_bytes()) | keys), encoding="utf-8")
    assert loading.read_base_fingerprint(model) == before[0]
    assert (loading.compute_config_fingerprint(model) != before[1]) == changes


def test_fingerprint_of_the_bundled_model_is_that_of_committed_records() -> None:
    """A change of how it is computed would make every committed record one of another base model."""
    record = read_record(REPOSITORY / "docs" / "results" / "demo" / "full" / "record.json")
    assert loading.read_base_fingerprint(Model()) == record.model_fingerprint


def test_fingerprint_of_a_hub_model_is_its_commit(base_folder: Folder) -> None:
    """Transformers stores the commit in the config of a model from the hub."""
    base = loading.load_model(Model(path=str(base_folder("gpt2_tied"))))
    base.model.config._commit_hash = "0123abc"
    assert loading.compute_model_fingerprint(base.model.config, Model(path="some/model")) == "commit 0123abc"


def test_recipe_dropout_sets_every_dropout_rate(base_folder: Folder) -> None:
    """With null, the rates of the config are kept."""
    path = str(base_folder("gpt2_tied"))
    modules = loading.load_model(Model(path=path, dropout=0.25)).model.modules()
    rates = [module.p for module in modules if isinstance(module, torch.nn.Dropout)]
    assert rates
    assert set(rates) == {0.25}
    llama = loading.load_config(Model(path=str(base_folder("llama_tied")), dropout=0.25))
    assert llama.attention_dropout == 0.25
    assert loading.load_config(Model(path=path)).resid_pdrop == 0.0


def test_dropout_is_refused_for_an_architecture_without_dropout(tmp_path: Path) -> None:
    """A rate of 0 is accepted."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}), encoding="utf-8")
    with pytest.raises(OutOfRangeError, match=r"mamba has no dropout, but model\.dropout=0\.1"):
        loading.load_config(Model(path=str(tmp_path), dropout=0.1))
    assert loading.load_config(Model(path=str(tmp_path), dropout=0.0)).model_type == "mamba"


def test_max_positions_is_read_under_either_key() -> None:
    """The value is None if a config has neither key."""
    from transformers import MambaConfig

    assert loading.get_max_positions(gpt2_config(n_positions=77)) == 77
    assert loading.get_max_positions(llama_config(max_position_embeddings=88)) == 88
    assert loading.get_max_positions(MambaConfig()) is None


def test_attention_implementation_is_that_of_the_recipe(base_folder: Folder) -> None:
    """The loaded config has the requested implementation."""
    path = str(base_folder("gpt2_tied"))
    for attention in ("sdpa", "eager"):
        base = loading.load_model(Model.model_validate({"path": path, "attention": attention}))
        assert base.model.config._attn_implementation == attention


def test_flash_attention_that_is_not_installed_is_refused(base_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other implementation replaces it."""
    from transformers import AutoModelForCausalLM

    def raise_error(*_: Any, **__: Any) -> None:
        raise ImportError("FlashAttention2 has been toggled on, but\nmore lines")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", raise_error)
    with pytest.raises(UnsupportedModelError, match="flash_attention_2 is not installed: FlashAttention2 has been"):
        loading.load_model(Model(path=str(base_folder("gpt2_tied")), attention="flash_attention_2"))


def test_tokenizer_of_another_folder(folder_copy: Path, base_folder: Folder) -> None:
    """A model without a tokenizer uses the one that the recipe names."""
    (folder_copy / "tokenizer.json").unlink()
    (folder_copy / "tokenizer_config.json").unlink()
    tokenizer_folder = base_folder("gpt2_tied")
    base = loading.load_model(Model(path=str(folder_copy), tokenizer=str(tokenizer_folder)))
    assert base.tokenizer.name_or_path == str(tokenizer_folder)


def _pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _delete_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _reshape_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros(10, 64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _delete_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _empty_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (_delete_head, r"no usable weights: 1 tensors are missing \(lm_head\.weight\)"),
    (_reshape_head, r"no usable weights: their shapes do not match config\.json"),
    (_delete_tokenizer, "no usable tokenizer"),
    (_empty_tokenizer, "no usable tokenizer"),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGES, ids=[damage.__name__.strip("_") for damage, _ in DAMAGES])
def test_damaged_folder_is_refused(damage: Callable[[Path], None], expected: str, folder_copy: Path) -> None:
    """The error is one sentence that names the folder and the missing or invalid part."""
    loading.load_model(Model(path=str(folder_copy)))
    damage(folder_copy)
    with pytest.raises(ModelNotFoundError, match=expected) as raised:
        loading.load_model(Model(path=str(folder_copy)))
    assert str(folder_copy) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_pickled_weights_are_never_read(folder_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that could execute code when it is loaded is not opened."""
    _pickle_weights(folder_copy)

    def raise_error(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", raise_error)
    with pytest.raises(ModelNotFoundError):
        loading.load_model(Model(path=str(folder_copy)))


def test_encoder_decoder_is_refused(folder_copy: Path) -> None:
    """The error names the model type."""
    (folder_copy / "config.json").write_text(json.dumps({"model_type": "t5"}), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="t5 has an encoder and a decoder"):
        loading.load_model(Model(path=str(folder_copy), init="random"))


@pytest.mark.parametrize(
    ("path", "error"),
    [("nobody/nothing", HubUnreachableError), ("/no/such/folder", ModelNotFoundError), ("./no", ModelNotFoundError)],
)
def test_unknown_model_path_is_refused(path: str, error: type[PeftbenchError]) -> None:
    """The path is not a folder, not in the cache, and the hub is unreachable: the error states what to set."""
    with pytest.raises(error, match=r"set model\.path to the folder of a local copy") as raised:
        loading.load_model(Model(path=path))
    assert repr(path) in str(raised.value)


def test_small_models_are_tied_as_named(base_folder: Folder) -> None:
    """Embedding and head share a matrix in exactly the models whose name ends in _tied."""
    assert ARCHITECTURES
    for architecture in ARCHITECTURES:
        model = loading.load_model(Model(path=str(base_folder(architecture)))).model
        shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert shared is architecture.endswith("_tied")


def test_fused_gelu_matches_the_formula(base_folder: Folder) -> None:
    """Fused, logits are equal up to rounding and one tensor is saved; unfused, logits equal those of transformers."""
    folder = str(base_folder("gpt2_tied"))
    ids = torch.arange(1, 40)[None]
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    plain = loading.load_model(Model(path=folder, fused_gelu=False)).model
    fused = loading.load_model(Model(path=folder)).model
    assert torch.equal(plain(input_ids=ids).logits, expected)
    assert torch.allclose(fused(input_ids=ids).logits, expected, atol=2e-5)
    assert not torch.equal(fused(input_ids=ids).logits, expected)
    saved_values: dict[str, int] = {}
    for name, model in (("plain", plain), ("fused", fused)):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):  # type: ignore[misc]
            blocks: Any = model.transformer
            blocks.h[0].mlp.act(torch.randn(7, 11, requires_grad=True))
        saved_values[name] = sum(sizes)
    assert saved_values["fused"] == 77
    assert saved_values["plain"] >= 3 * 77
    assert fused.config.activation_function == "gelu_new"  # the config to be saved is unchanged


@pytest.mark.parametrize("quantization", ["nf4", "nf4_double", "int8"])
@pytest.mark.parametrize("architecture", ["gpt2_tied", "llama_untied"])
def test_quantized_base_packs_the_matrices_of_the_blocks(
    quantization: Any, architecture: str, base_folder: Folder
) -> None:
    """They take one byte or half a byte per weight, other weights are float32; the parameter count is unchanged."""
    folder = str(base_folder(architecture))
    plain, base = (loading.load_model(Model(path=folder, quantization=q)).model for q in (None, quantization))
    packed = [p for p in base.parameters() if p.dtype in {torch.uint8, torch.int8}]
    per_matrix = 2 if quantization.startswith("nf4") else 1
    matrices = sum(p.numel() for p in packed) * per_matrix
    assert matrices == sum(
        module.weight.numel()
        for name, module in plain.named_modules()  # type: ignore[union-attr,misc]
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not plain.get_output_embeddings()
    )
    assert {p.dtype for p in base.parameters()} - {torch.uint8, torch.int8} == {torch.float32}
    assert base.num_parameters() == plain.num_parameters()


def test_quantization_of_random_weights_is_refused(base_folder: Folder) -> None:
    """The error names the key."""
    with pytest.raises(OutOfRangeError, match=r"model\.quantization needs pretrained weights"):
        loading.load_model(Model(path=str(base_folder("gpt2_tied")), init="random", quantization="nf4"))
