"""Merged weights give the logits of the adapter, in the type in which they are written; other merges are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peftbench.common.dtypes import TORCH_DTYPES
from peftbench.errors import DiskFullError, MergeError, ModelError
from peftbench.export.comparison import TOLERANCES
from peftbench.export.folder import ExportRequest, export_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IDS = torch.tensor([[5, 17, 123, 4000, 8, 99, 256, 31]])


def load(folder: Path) -> PreTrainedModel:
    """Load a folder with transformers in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # type: ignore[no-any-return]


def compute_logits(model: Any) -> torch.Tensor:
    """Return the logits of fixed tokens."""
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def load_adapter(base: Path, adapter: Path) -> PeftModel:
    """Load an adapter on its base model with peft."""
    return PeftModel.from_pretrained(load(base), str(adapter))


def list_files(folder: Path) -> list[str]:
    """Return the names of all files and folders below ``folder``."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("name", "architecture"), [("lora", "llama_tied"), ("lora_conv1d", "gpt2_tied"), ("dora", "llama_untied")]
)
def test_merged_model_has_the_logits_of_the_adapter(
    name: str,
    architecture: str,
    finished_run: Callable[[str], Path],
    base_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """The adapter is loaded with peft, the merged model with transformers; both need nothing of peftbench."""
    run, base = finished_run(name), base_folder(architecture)
    exported = export_model(ExportRequest(run, tmp_path / "merged", merge=True))
    expected = compute_logits(load_adapter(base, run / "model"))
    assert not torch.allclose(expected, compute_logits(load(base)), atol=1e-2), "the adapter changes nothing"
    torch.testing.assert_close(compute_logits(load(exported.folder)), expected, atol=2e-3, rtol=1e-4)
    assert not (exported.folder / "adapter_config.json").exists()
    assert exported.comparison is not None
    assert exported.comparison.dtype == "fp32", "the base is stored in float32"
    assert exported.comparison.num_texts == 5, "a fixed text and four examples of the run"
    assert exported.comparison.error < 1e-5


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_merged_model_is_written_and_checked_in_the_type_asked_for(
    dtype: Any, finished_run: Callable[[str], Path], tmp_path: Path
) -> None:
    """The written weights have that type, and the error of the check is that of rounding: neither zero nor large."""
    exported = export_model(ExportRequest(finished_run("lora"), tmp_path / "merged", merge=True, dtype=dtype))
    written = AutoModelForCausalLM.from_pretrained(exported.folder, dtype="auto")
    assert {parameter.dtype for parameter in written.parameters()} == {TORCH_DTYPES[dtype]}
    assert exported.comparison is not None
    assert 1e-5 < exported.comparison.error < TOLERANCES[dtype] / 2


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_quantized_base_is_dequantized(
    name: str, finished_run: Callable[[str], Path], base_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The merged weights are those that the training used, not those of the unquantized base."""
    run = finished_run(name)
    exported = export_model(ExportRequest(run, tmp_path / "merged", merge=True))
    merged = load(exported.folder)
    assert "quantization_config" not in json.loads((exported.folder / "config.json").read_bytes())
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    assert exported.comparison is not None
    assert exported.comparison.error < 1e-4
    unquantized = compute_logits(load_adapter(base_folder("llama_tied"), run / "model"))
    difference = float((compute_logits(merged) - unquantized).norm() / unquantized.norm())
    assert difference > 100 * exported.comparison.error


@pytest.mark.parametrize("name", ["full", "last_layer"])
def test_whole_model_is_written_in_another_type(name: str, finished_run: Callable[[str], Path], tmp_path: Path) -> None:
    """--merge of a saved whole model converts it."""
    run = finished_run(name)
    exported = export_model(ExportRequest(run, tmp_path / "merged", merge=True, dtype="bf16"))
    difference = compute_logits(load(exported.folder)) - compute_logits(load(run / "model"))
    assert 0 < float(difference.abs().max()) < 0.5
    assert exported.comparison is not None
    assert exported.comparison.adapter_effect is None


def test_prompt_tuning_is_refused_with_what_to_do(finished_run: Callable[[str], Path], tmp_path: Path) -> None:
    """The base model has no weights for soft tokens."""
    with pytest.raises(MergeError, match=r"prompt_tuning, whose trained part cannot be merged .*without --merge"):
        export_model(ExportRequest(finished_run("prompt_tuning"), tmp_path / "new" / "merged", merge=True))
    assert list_files(tmp_path) == []


def test_wrong_merge_is_refused_and_leaves_nothing(
    finished_run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that changes one matrix by a tenth is found; nothing is left, not even a parent folder."""
    from peft import LoraModel

    original = LoraModel.merge_and_unload

    def merge_wrongly(self: LoraModel, **options: Any) -> Any:
        merged = original(self, **options)
        with torch.no_grad():
            next(p for name, p in merged.named_parameters() if "q_proj" in name).mul_(0.9)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", merge_wrongly)
    with pytest.raises(MergeError, match="differ from the adapter's by"):
        export_model(ExportRequest(finished_run("lora"), tmp_path / "new" / "merged", merge=True))
    assert list_files(tmp_path) == []


def test_lost_adapter_is_found_although_it_changes_little(
    finished_run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an adapter of a small effect, an unmerged base is within the tolerance of every type, and is refused."""
    from peft import LoraModel
    from safetensors.torch import load_file, save_file

    run = tmp_path / "run"
    shutil.copytree(finished_run("lora"), run)
    file = run / "model" / "adapter_model.safetensors"
    weights = {name: weight * (0.03 if "lora_B" in name else 1) for name, weight in load_file(file).items()}
    save_file(weights, file)
    exported = export_model(ExportRequest(run, tmp_path / "merged", merge=True, dtype="bf16"))
    assert exported.comparison is not None
    assert exported.comparison.adapter_effect is not None
    assert 1e-4 < exported.comparison.adapter_effect < TOLERANCES["bf16"]

    original = LoraModel.unload
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **_: original(self))
    with pytest.raises(MergeError, match="differ from the adapter's by"):
        export_model(ExportRequest(run, tmp_path / "lost", merge=True, dtype="bf16"))
    assert not (tmp_path / "lost").exists()


def test_weights_that_the_type_cannot_hold_are_refused(finished_run: Callable[[str], Path], tmp_path: Path) -> None:
    """An fp16 copy of weights above 65,504 has infinite values."""
    from safetensors.torch import load_file, save_file

    run = tmp_path / "run"
    shutil.copytree(finished_run("full"), run)
    file = run / "model" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "q_proj" in name)
    weights[name] = weights[name] + 70_000
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"in fp16 differ .* use --dtype fp32"):
        export_model(ExportRequest(run, tmp_path / "merged", merge=True, dtype="fp16"))
    assert list_files(tmp_path) == sorted([f"run/{name}" for name in list_files(run)] + ["run"])


def test_disk_without_room_is_refused_before_writing(
    finished_run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names both sizes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 2048))
    for is_merged in (True, False):
        with pytest.raises(DiskFullError, match=r"needs .* [KM]iB, but the disk of .* has 2 KiB left"):
            export_model(ExportRequest(finished_run("lora"), tmp_path / "merged", merge=is_merged))
    assert list_files(tmp_path) == []


def test_changed_base_is_refused(
    finished_run: Callable[[str], Path], base_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """An adapter is merged only into the weights that it was trained on."""
    run = tmp_path / "run"
    shutil.copytree(finished_run("lora"), run)
    record = json.loads((run / "record.json").read_bytes())
    record["model_fingerprint"] = "blake2b 0123"
    (run / "record.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ModelError, match="has changed since"):
        export_model(ExportRequest(run, tmp_path / "merged", merge=True))


def test_examples_that_are_gone_are_named(finished_run: Callable[[str], Path], tmp_path: Path) -> None:
    """The fixed text alone is compared, and the result has the reason."""
    run = tmp_path / "run"
    shutil.copytree(finished_run("lora"), run)
    record = json.loads((run / "record.json").read_bytes())
    record["recipe"]["data"]["source"]["test"] = str(tmp_path / "gone.jsonl")
    (run / "record.json").write_text(json.dumps(record), encoding="utf-8")
    training = json.loads((run / "model" / "training.json").read_bytes())
    assert training["training_fingerprint"]
    exported = export_model(ExportRequest(run, tmp_path / "merged", merge=True))
    assert exported.comparison is not None
    assert exported.comparison.num_texts == 1
    assert "gone.jsonl" in str(exported.comparison.missing_examples)


def test_weight_that_is_not_written_is_found(
    finished_run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that differs by one rounding from what was merged is within every tolerance, and is refused."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.save_pretrained

    def save_wrongly(self: PreTrainedModel, folder: Path, **options: Any) -> None:
        parameter = next(parameter for name, parameter in self.named_parameters() if "q_proj" in name)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.01)
            original(self, folder, **options)
            parameter.copy_(kept)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_wrongly)
    with pytest.raises(MergeError, match=r"loads another .*q_proj\.weight from the merged model than was written"):
        export_model(ExportRequest(finished_run("lora"), tmp_path / "merged", merge=True, dtype="bf16"))
    assert list_files(tmp_path) == []
