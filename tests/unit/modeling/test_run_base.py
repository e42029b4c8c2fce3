"""The folder of a finished run as model.path: its trained model is the base, and a note names the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from peftbench.errors import MergeError, ModelError, ModelNotFoundError, OutOfRangeError
from peftbench.memory.simulation.model import build_meta_model
from peftbench.modeling.loading import load_config, load_model, read_base_fingerprint
from peftbench.recipe.schema import Model, Recipe
from peftbench.record import RunRecord
from tests.helpers.finished_runs import build_recipe, train_run, write_rows

IDS = torch.tensor([[5, 17, 123, 4000, 8, 99, 256, 31]])
LORA = {"kind": "lora", "r": 4}


def compute_logits(model: Any) -> torch.Tensor:
    """Return the logits of fixed tokens."""
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def load_saved(folder: Path, base: Path | None = None) -> Any:
    """Load a run's model with transformers, or its adapter on ``base`` with peft."""
    model = AutoModelForCausalLM.from_pretrained(base or folder / "model", dtype=torch.float32)
    return model if base is None else PeftModel.from_pretrained(model, str(folder / "model"))


class Workplace:
    """Trains runs in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows = write_rows(folder)

    def recipe(self, base: Path | str, method: dict[str, Any], name: str, **sections: Any) -> Recipe:
        """Return the recipe of a run."""
        return build_recipe(base, self._rows, self.folder, method, name=name, **sections)

    def train(self, base: Path | str, method: dict[str, Any], name: str, **sections: Any) -> Path:
        """Train a run and return its folder."""
        assert train_run(self.recipe(base, method, name, **sections)).outcome.kind == "ok"
        return self.folder / name

    def read(self, name: str) -> RunRecord:
        """Return the record of a run."""
        return RunRecord.model_validate_json((self.folder / name / "record.json").read_bytes())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Return a folder for runs that tests share and do not change."""
    return Workplace(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def base(base_folder: Callable[[str], Path]) -> Path:
    """Return the folder of the first base model."""
    return base_folder("llama_tied")


@pytest.fixture(scope="module")
def first(workplace: Workplace, base: Path) -> Path:
    """Return a finished run of LoRA."""
    return workplace.train(base, LORA, "first")


@pytest.fixture(scope="module")
def second(workplace: Workplace, first: Path) -> Path:
    """Return a finished run of LoRA that started from the model of ``first``."""
    return workplace.train(first, LORA, "second")


def test_adapter_is_merged_in_memory(first: Path, base: Path) -> None:
    """The loaded base has the logits of base and adapter, and no trace of peft; all its weights can be trained."""
    loaded = load_model(Model(path=str(first)))
    torch.testing.assert_close(
        compute_logits(loaded.model), compute_logits(load_saved(first, base)), atol=2e-3, rtol=1e-4
    )
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not hasattr(loaded.model, "peft_config")
    assert loaded.notes == (f"the base model is the run first: its lora adapter, merged into {base.name}",)


def test_fingerprint_covers_base_and_adapter(first: Path, base: Path, tmp_path: Path) -> None:
    """It changes with a weight of the adapter, and is known without loading weights."""
    fingerprint = read_base_fingerprint(Model(path=str(first)))
    assert fingerprint == load_model(Model(path=str(first))).fingerprint
    assert fingerprint.startswith(read_base_fingerprint(Model(path=str(base))) + " + adapter blake2b ")
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    content = bytearray((copy / "model" / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model" / "adapter_model.safetensors").write_bytes(content)
    assert read_base_fingerprint(Model(path=str(copy))) != fingerprint


def test_second_training_starts_from_the_model_of_the_first(workplace: Workplace, second: Path, first: Path) -> None:
    """The first loss of the second run is that of the trained model, below that of the first run's start."""
    one, two = workplace.read("first"), workplace.read("second")
    assert two.step_losses[0] < one.step_losses[0] - 0.1
    assert any("the base model is the run first" in note for note in two.notes)
    assert two.model_fingerprint == read_base_fingerprint(Model(path=str(first)))
    assert PeftConfig.from_pretrained(str(second / "model")).base_model_name_or_path == str(first)


def test_runs_are_stacked_to_any_depth(second: Path, first: Path, base: Path) -> None:
    """The model of the second run is base, first adapter and second adapter."""
    merged = load_saved(first, base).merge_and_unload()
    expected = compute_logits(PeftModel.from_pretrained(merged, str(second / "model")))
    loaded = load_model(Model(path=str(second)))
    torch.testing.assert_close(compute_logits(loaded.model), expected, atol=2e-3, rtol=1e-4)
    assert [note.partition(":")[0] for note in loaded.notes] == [
        "the base model is the run first",
        "the base model is the run second",
    ]


@pytest.mark.parametrize("kind", ["full", "last_layer"])
def test_saved_whole_model_is_the_base(kind: str, workplace: Workplace, base: Path) -> None:
    """The loaded base has the saved weights."""
    run = workplace.train(base, {"kind": kind}, kind)
    loaded = load_model(Model(path=str(run)))
    assert torch.equal(compute_logits(loaded.model), compute_logits(load_saved(run)))
    assert loaded.notes == (f"the base model is the run {kind}: the model that it saved ({kind})",)
    assert loaded.fingerprint == read_base_fingerprint(Model(path=str(run / "model")))


def test_run_is_planned_from_its_config(second: Path, base: Path) -> None:
    """An estimate has the shapes of the first base model, and loads no weights."""
    planned = build_meta_model(Model(path=str(second)), torch.float32).model
    first_base = build_meta_model(Model(path=str(base)), torch.float32).model
    assert {n: p.shape for n, p in planned.named_parameters()} == {n: p.shape for n, p in first_base.named_parameters()}


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"quantization": "nf4"}, MergeError, r"quantization=nf4, and an adapter .* peftbench export .*first --merge"),
        ({"init": "random"}, OutOfRangeError, "model.init=random has no meaning for model.path="),
        ({"revision": "main"}, OutOfRangeError, "model.revision='main' has no meaning for model.path="),
    ],
)
def test_keys_without_meaning_for_a_run_are_refused(
    keys: dict[str, Any], error: type[Exception], message: str, first: Path
) -> None:
    """The message names the key and what to do."""
    with pytest.raises(error, match=message):
        load_config(Model(path=str(first), **keys))


def test_prompt_tuning_run_is_refused(workplace: Workplace, base: Path) -> None:
    """Soft tokens cannot be merged; the message names the base."""
    run = workplace.train(base, {"kind": "prompt_tuning", "num_virtual_tokens": 4}, "soft")
    with pytest.raises(MergeError, match=rf"run of prompt_tuning, .* set model\.path={base}"):
        load_config(Model(path=str(run)))


def test_run_on_a_quantized_base_is_refused(workplace: Workplace, base: Path) -> None:
    """The merge needs unquantized weights; the message has the command that writes them."""
    run = workplace.train(base, LORA, "nf4", model={"quantization": "nf4"})
    with pytest.raises(MergeError, match=r"was trained with model\.quantization=nf4, .* peftbench export .* --merge"):
        load_config(Model(path=str(run)))


def test_changed_base_is_refused(workplace: Workplace, base: Path, tmp_path: Path) -> None:
    """The adapter belongs to the weights that it was trained on."""
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    run = workplace.train(copy, LORA, "on_copy")
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="has changed since the run was trained on it"):
        load_model(Model(path=str(run)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outcome": {"kind": "diverged"}}, "ended with the outcome diverged; run it again"),
        ({"started_at": "2020-01-01T00:00:00+00:00"}, "has no saved model .* save_model=true"),
    ],
)
def test_unfinished_run_is_refused(change: dict[str, Any], message: str, first: Path, tmp_path: Path) -> None:
    """A run that failed, or whose folder has the model of another training, is refused."""
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    record = json.loads((copy / "record.json").read_bytes()) | change
    (copy / "record.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ModelNotFoundError, match=message):
        load_config(Model(path=str(copy)))


def test_adapter_folder_names_its_base_and_its_run(first: Path, base: Path, tmp_path: Path) -> None:
    """A plain adapter is refused as before; inside a run, the message also names the run."""
    with pytest.raises(ModelNotFoundError, match=rf"set model\.path={base}, .*, or model\.path={first}, the run"):
        load_config(Model(path=str(first / "model")))
    shutil.copytree(first / "model", tmp_path / "adapter")
    with pytest.raises(ModelNotFoundError, match=rf"set model\.path={base}, the adapter's base model$"):
        load_config(Model(path=str(tmp_path / "adapter")))


def test_run_that_is_its_own_base_is_refused(workplace: Workplace, first: Path, second: Path, tmp_path: Path) -> None:
    """A recipe may not overwrite its base; two runs that were trained on each other's older models are refused."""
    with pytest.raises(ValueError, match="is the folder that this run writes to; give the run another name"):
        workplace.recipe(first, LORA, "first")
    for name, other in (("first", "second"), ("second", "first")):
        shutil.copytree(workplace.folder / name, tmp_path / name)
        record = json.loads((tmp_path / name / "record.json").read_bytes())
        record["recipe"]["model"]["path"] = str(tmp_path / other)
        (tmp_path / name / "record.json").write_text(json.dumps(record), encoding="utf-8")
        (tmp_path / name / "model" / "training.json").unlink()
    with pytest.raises(ModelError, match="is a base of itself"):
        load_config(Model(path=str(tmp_path / "first")))
