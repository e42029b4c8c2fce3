"""The base: loaded in float32 as the recipe says, known by its weights, and refused in one sentence where it is not."""

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
from peftbench.recipe.schema import Model
from tests.helpers.methods import every_architecture
from tests.helpers.models import ARCHITECTURES, POSITIONS, gpt2_config, llama_config

Folder = Callable[[str], Path]


@pytest.fixture
def own_folder(base_folder: Folder, tmp_path: Path) -> Path:
    """A copy of an untied Llama's folder, to be spoilt."""
    return Path(shutil.copytree(base_folder("llama_untied"), tmp_path / "base"))


@every_architecture
def test_loads_what_was_saved(architecture: str, base_folder: Folder) -> None:
    """A folder's base has its weights, in float32, no cache in training, and the tokenizer beside it."""
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


def test_the_shipped_base() -> None:
    """The base that comes with the package loads by its name, in float32 whatever it is stored in, with its hash."""
    base = loading.load_model(Model(path=shipped.SHIPPED_MODEL))
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}
    assert base.fingerprint.startswith("blake2b ")
    assert base.model.get_input_embeddings().weight.shape[0] >= len(base.tokenizer)  # type: ignore[union-attr,index]


@every_architecture
def test_random_weights_are_said_to_be_random(architecture: str, base_folder: Folder) -> None:
    """The architecture alone has weights of no file, which depend on the seed, and the record says so."""
    knobs = Model(path=str(base_folder(architecture)), init="random")
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        base = loading.load_model(knobs)
        weights.append(base.model.get_input_embeddings().weight.detach())  # type: ignore[operator,union-attr]
    assert base.fingerprint == "random weights"
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], loading.load_model(Model(path=knobs.path)).model.get_input_embeddings().weight)  # type: ignore[arg-type]


def test_random_weights_need_no_file(own_folder: Path) -> None:
    """The architecture alone is made from a config, without weights."""
    (own_folder / "model.safetensors").unlink()
    assert loading.load_model(Model(path=str(own_folder), init="random")).fingerprint == "random weights"


def test_identity_is_of_the_weights(own_folder: Path, base_folder: Folder) -> None:
    """Two folders with the same weights have one identity, and one other number makes another."""
    original = loading.load_model(Model(path=str(base_folder("llama_untied")))).fingerprint
    assert loading.load_model(Model(path=str(own_folder))).fingerprint == original
    weights = load_file(own_folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, own_folder / "model.safetensors", metadata={"format": "pt"})
    assert loading.load_model(Model(path=str(own_folder))).fingerprint != original


def test_identity_of_a_hub_model(base_folder: Folder) -> None:
    """Of a base from the hub the commit is known, and is its identity."""
    base = loading.load_model(Model(path=str(base_folder("gpt2_tied"))))
    base.model.config._commit_hash = "0123abc"
    assert loading.compute_model_fingerprint(base.model, Model(path="some/model")) == "commit 0123abc"


def test_dropout_of_the_recipe(base_folder: Folder) -> None:
    """The recipe's dropout is that of every dropout in the base; null leaves its config's."""
    path = str(base_folder("gpt2_tied"))
    modules = loading.load_model(Model(path=path, dropout=0.25)).model.modules()
    found = [module.p for module in modules if isinstance(module, torch.nn.Dropout)]
    assert found
    assert set(found) == {0.25}
    llama = loading.load_config(Model(path=str(base_folder("llama_tied")), dropout=0.25))
    assert llama.attention_dropout == 0.25
    assert loading.load_config(Model(path=path)).resid_pdrop == 0.0


def test_dropout_where_there_is_none(tmp_path: Path) -> None:
    """Asking for dropout where an architecture has none is refused, and asking for none is not."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}), encoding="utf-8")
    with pytest.raises(OutOfRangeError, match=r"mamba has no dropout, but model\.dropout=0\.1"):
        loading.load_config(Model(path=str(tmp_path), dropout=0.1))
    assert loading.load_config(Model(path=str(tmp_path), dropout=0.0)).model_type == "mamba"


def test_positions_under_either_name() -> None:
    """Positions are found under either of their names, and are None where a config has neither."""
    from transformers import MambaConfig

    assert loading.get_max_positions(gpt2_config(n_positions=77)) == 77
    assert loading.get_max_positions(llama_config(max_position_embeddings=88)) == 88
    assert loading.get_max_positions(MambaConfig()) is None


def test_attention_is_the_one_asked_for(base_folder: Folder) -> None:
    """The attention implementation is the recipe's."""
    path = str(base_folder("gpt2_tied"))
    for attention in ("sdpa", "eager"):
        base = loading.load_model(Model.model_validate({"path": path, "attention": attention}))
        assert base.model.config._attn_implementation == attention


def test_attention_that_is_not_there(base_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention where it is not installed is refused, never replaced."""
    from transformers import AutoModelForCausalLM

    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("FlashAttention2 has been toggled on, but\nmore lines")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(UnsupportedModelError, match="flash_attention_2 is not installed: FlashAttention2 has been"):
        loading.load_model(Model(path=str(base_folder("gpt2_tied")), attention="flash_attention_2"))


def test_tokenizer_from_elsewhere(own_folder: Path, base_folder: Folder) -> None:
    """A base without a tokenizer of its own takes the one that the recipe names."""
    (own_folder / "tokenizer.json").unlink()
    (own_folder / "tokenizer_config.json").unlink()
    elsewhere = base_folder("gpt2_tied")
    base = loading.load_model(Model(path=str(own_folder), tokenizer=str(elsewhere)))
    assert base.tokenizer.name_or_path == str(elsewhere)


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    _without_weights(folder)


def _cut_short(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _without_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _other_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros(10, 64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _spoilt_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")


def _spoilt_config(folder: Path) -> None:
    (folder / "config.json").write_text("{ no json", encoding="utf-8")


def _unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "nosuch"}), encoding="utf-8")


SPOILT: list[tuple[Callable[[Path], None], str]] = [
    (_without_weights, r"no usable weights.*put model\.safetensors there, or set model\.init=random"),
    (_pickled, "no usable weights"),
    (_cut_short, "no usable weights"),
    (_without_head, r"no usable weights: 1 tensors are missing \(lm_head\.weight\)"),
    (_other_shape, r"no usable weights: their shapes do not match config\.json"),
    (_without_tokenizer, "no usable tokenizer"),
    (_spoilt_tokenizer, "no usable tokenizer"),
    (_spoilt_config, "no usable config"),
    (_unknown_type, "no usable config: .*nosuch"),
]


@pytest.mark.parametrize(("spoil", "expected"), SPOILT, ids=[spoil.__name__.strip("_") for spoil, _ in SPOILT])
def test_a_spoilt_folder(spoil: Callable[[Path], None], expected: str, own_folder: Path) -> None:
    """Whatever is missing or broken in a folder is said in one sentence that names it; nothing is made up instead."""
    loading.load_model(Model(path=str(own_folder)))
    spoil(own_folder)
    with pytest.raises(ModelNotFoundError, match=expected) as caught:
        loading.load_model(Model(path=str(own_folder)))
    assert str(own_folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_never_read(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that could run code when it is read is not opened."""
    _pickled(own_folder)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(ModelNotFoundError):
        loading.load_model(Model(path=str(own_folder)))


def test_no_causal_language_model(own_folder: Path) -> None:
    """An encoder-decoder is refused for what it is."""
    (own_folder / "config.json").write_text(json.dumps({"model_type": "t5"}), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="t5 is not a causal language model"):
        loading.load_model(Model(path=str(own_folder), init="random"))


@pytest.mark.parametrize(
    ("path", "kind"),
    [("nobody/nothing", HubUnreachableError), ("/no/such/folder", ModelNotFoundError), ("./no", ModelNotFoundError)],
)
def test_nothing_of_that_name(path: str, kind: type[PeftbenchError]) -> None:
    """A name that is neither a folder nor in the cache, with no hub to ask, is said to be so, with what to do."""
    with pytest.raises(kind, match=r"set model\.path to the folder of a local copy") as caught:
        loading.load_model(Model(path=path))
    assert repr(path) in str(caught.value)


def test_architectures_of_the_tests_are_what_they_say(base_folder: Folder) -> None:
    """The small bases that all tests run through are tied and untied as their names say."""
    assert ARCHITECTURES
    for architecture in ARCHITECTURES:
        model = loading.load_model(Model(path=str(base_folder(architecture)))).model
        shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert shared is architecture.endswith("_tied")


def test_the_fused_gelu_is_the_same_function(base_folder: Folder) -> None:
    """One kernel in place of the formula written out: the same logits to rounding; off, to the last bit of theirs."""
    folder = str(base_folder("gpt2_tied"))
    ids = torch.arange(1, 40)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    plain = loading.load_model(Model(path=folder, fused_gelu=False)).model
    fused = loading.load_model(Model(path=folder)).model
    assert torch.equal(plain(input_ids=ids).logits, theirs)
    assert torch.allclose(fused(input_ids=ids).logits, theirs, atol=2e-5)
    assert not torch.equal(fused(input_ids=ids).logits, theirs)
    kept: dict[str, int] = {}
    for name, model in (("plain", plain), ("fused", fused)):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):  # type: ignore[misc]
            blocks: Any = model.transformer
            blocks.h[0].mlp.act(torch.randn(7, 11, requires_grad=True))
        kept[name] = sum(sizes)
    assert kept["fused"] == 77
    assert kept["plain"] >= 3 * 77
    assert fused.config.activation_function == "gelu_new"  # as it will be saved


@pytest.mark.parametrize("quantization", ["nf4", "nf4_double", "int8"])
@pytest.mark.parametrize("architecture", ["gpt2_tied", "llama_untied"])
def test_a_quantised_base(quantization: Any, architecture: str, base_folder: Folder) -> None:
    """Matrices of the blocks in a byte or half, all else in float32, and as many parameters as without."""
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


def test_an_architecture_alone_is_not_quantised(base_folder: Folder) -> None:
    """There is nothing loaded that could be."""
    with pytest.raises(OutOfRangeError, match=r"model\.quantization needs pretrained weights"):
        loading.load_model(Model(path=str(base_folder("gpt2_tied")), init="random", quantization="nf4"))
