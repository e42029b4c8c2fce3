"""The exported folder: what it has, that it works elsewhere, and that nothing private is in it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, GenerationConfig

from peftbench.errors import (
    MergeError,
    MissingFileError,
    ModelNotFoundError,
    OutOfRangeError,
    OutputError,
    RecordError,
    RunLockedError,
)
from peftbench.export.folder import ExportRequest, export_model
from peftbench.recipe.loader import load_recipe
from peftbench.record import read_record
from peftbench.run_dir.lock import Lock
from tests.helpers.finished_runs import build_recipe, train_run, write_rows
from tests.unit.export.test_merge import compute_logits, load, load_adapter

PRIVATE = "jane doe"
"""A name with a space in the folders of the private run."""


def read_texts(folder: Path) -> dict[str, str]:
    """Return the content of every text file of a folder, by name."""
    files = (path for path in folder.iterdir() if path.suffix != ".safetensors")
    return {path.name: path.read_text(encoding="utf-8") for path in files}


def read_metadata(folder: Path) -> dict[str, object]:
    """Return the YAML metadata of a folder's model card."""
    _, metadata, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(metadata)  # type: ignore[no-any-return]


def extract_code(folder: Path) -> str:
    """Return the Python code of a folder's model card."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    return card.split("```python\n")[1].split("```")[0]


def run_code(code: str, directory: Path) -> str:
    """Run Python code in a working directory and return what it prints."""
    before, output = Path.cwd(), io.StringIO()
    os.chdir(directory)
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(code, "card", "exec"), {})  # noqa: S102 — the code of the card is what is tested
    finally:
        os.chdir(before)
    return output.getvalue()


@pytest.mark.parametrize("name", ["lora", "prompt_tuning"])
def test_adapter_is_exported_for_peft(
    name: str, finished_run: Callable[[str], Path], base_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The copy has the logits of the run's adapter, a tokenizer and the base's generation config."""
    run = finished_run(name)
    base = base_folder("llama_tied" if name == "lora" else "gpt2_tied")
    exported = export_model(ExportRequest(run, tmp_path / "adapter"))
    assert exported.comparison is None
    expected, logits = (compute_logits(load_adapter(base, folder)) for folder in (run / "model", exported.folder))
    assert torch.equal(logits, expected)
    assert AutoTokenizer.from_pretrained(exported.folder)("a b")["input_ids"]
    assert GenerationConfig.from_pretrained(exported.folder).eos_token_id == 0
    config = json.loads((exported.folder / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == base.name
    assert not (exported.folder / "training.json").exists()
    assert not list(tmp_path.glob(".*")), "no temporary folder is left"


def test_whole_model_is_exported_for_transformers(finished_run: Callable[[str], Path], tmp_path: Path) -> None:
    """The copy has the logits of the run's model."""
    run = finished_run("full")
    exported = export_model(ExportRequest(run, tmp_path / "full"))
    assert torch.equal(compute_logits(load(exported.folder)), compute_logits(load(run / "model")))
    assert read_metadata(exported.folder)["library_name"] == "transformers"


@pytest.mark.parametrize(("name", "merge"), [("lora", False), ("lora", True), ("full", False), ("oft", False)])
def test_code_in_the_card_works(
    name: str,
    merge: bool,
    finished_run: Callable[[str], Path],
    base_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """The code loads the model by its name and prints generated text."""
    exported = export_model(ExportRequest(finished_run(name), tmp_path / "my-model", merge=merge))
    base = base_folder("gpt2_tied" if name == "oft" else "llama_tied")
    (tmp_path / base.name).symlink_to(base)  # a local base model is loaded by its name
    code = extract_code(exported.folder)
    assert ("nn.Linear" in code) == (name == "oft")
    output = run_code(code.replace("max_new_tokens=64", "max_new_tokens=8"), tmp_path)  # short models
    assert "Write your prompt here." in output


def test_card_has_what_the_record_has(finished_run: Callable[[str], Path], tmp_path: Path) -> None:
    """Data, quality with intervals, costs, device and the command of the training are in the card."""
    run = finished_run("lora")
    exported = export_model(ExportRequest(run, tmp_path / "merged", merge=True))
    record = read_record(run / "record.json")
    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    assert record.quality is not None
    assert record.quality.loss is not None
    assert record.parameters is not None
    score = next(iter(record.quality.metrics.values()))
    for text in (
        f"{record.parameters.trainable:,}",
        f"train: {record.num_examples['train']} examples",
        f"test: {record.num_examples['test']} examples",
        str(record.data_fingerprint),
        f"{record.quality.loss:.4f}",
        f"{record.quality.perplexity:.2f}",
        score.definition.title,
        f"{score.interval.mean:.{score.definition.digits}f}",
        "python launch/train.py recipe.yaml",
        f"torch {record.library_versions['torch']}",
        "task: completion",
        "tolerance",
    ):
        assert text in card, text
    assert read_metadata(exported.folder) == {
        "library_name": "transformers",
        "license": "unknown",
        "metrics": list(record.quality.metrics),
        "pipeline_tag": "text-generation",
        "tags": ["peftbench", "lora"],
    }


def test_recipe_in_the_folder_repeats_the_training(finished_run: Callable[[str], Path], tmp_path: Path) -> None:
    """With the base and the data in the same folder, the published recipe trains the same weights."""
    run = finished_run("lora")
    exported = export_model(ExportRequest(run, tmp_path / "lora"))
    original = read_record(run / "record.json").recipe
    published = load_recipe([exported.folder / "recipe.yaml"])
    restored = published.model_dump(mode="json")
    restored["output_dir"] = original["output_dir"]
    restored["model"]["path"] = original["model"]["path"]
    restored["data"]["source"] = original["data"]["source"]
    assert restored == original
    assert published.output_dir == "runs"
    assert getattr(published.data.source, "train") == "rows.jsonl"  # noqa: B009 — the type depends on the kind


def test_no_folder_and_no_secret_is_published(
    base_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the user's folders, whatever characters they have, nor a token of the environment are in the export."""
    secret = "hf_" + "abcdefghijklmnop"
    monkeypatch.setenv("HF_TOKEN", secret)
    private = tmp_path / PRIVATE
    base = private / "models" / "base"
    shutil.copytree(base_folder("llama_tied"), base)
    rows = write_rows(private)
    method = {"kind": "lora", "r": 2}
    # The global batch repeats the examples, and the test split is the training split: both are noted or counted.
    train_run(build_recipe(base, rows, private / "runs", method, train={"repeat_examples": True}, name="mine"))
    monkeypatch.chdir(private)
    for merge in (False, True):
        exported = export_model(ExportRequest(private / "runs" / "mine", tmp_path / f"out{merge}", merge=merge))
        texts = read_texts(exported.folder)
        assert {"README.md", "recipe.yaml", "tokenizer_config.json", "generation_config.json"} <= set(texts)
        for file, text in texts.items():
            for part in (PRIVATE, str(tmp_path), "/tmp/", secret):  # noqa: S108
                assert part not in text, f"{part} in {file} (merge={merge})"
        assert "base" in texts["README.md"]
        assert "rows.jsonl" in texts["README.md"]


def test_adapter_names_its_base_on_the_hub(finished_run: Callable[[str], Path], tmp_path: Path) -> None:
    """For a base of the Hub, the card and the adapter's config have its name, and the code its commit."""
    run = tmp_path / "run"
    shutil.copytree(finished_run("lora"), run)
    record = json.loads((run / "record.json").read_bytes())
    record["recipe"]["model"]["path"] = "org/some-model"
    record["recipe"]["data"]["source"] = {"kind": "hub", "path": "org/data", "config": None, "id": None}
    record["model_fingerprint"] = "commit 0123abcd"
    (run / "record.json").write_text(json.dumps(record), encoding="utf-8")
    (run / "model" / "training.json").unlink()
    exported = export_model(ExportRequest(run, tmp_path / "adapter", repository="me/adapter"))
    metadata = read_metadata(exported.folder)
    assert (metadata["base_model"], metadata["datasets"]) == ("org/some-model", ["org/data"])
    code = extract_code(exported.folder)
    assert 'AutoModelForCausalLM.from_pretrained("org/some-model", revision="0123abcd")' in code
    assert 'PeftModel.from_pretrained(base, "me/adapter")' in code
    config = json.loads((exported.folder / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == "org/some-model"


def test_license_of_the_base_is_taken_from_its_card(base_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A license that the base model's folder states is known."""
    base = tmp_path / "base"
    shutil.copytree(base_folder("gpt2_tied"), base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Base\n", encoding="utf-8")
    train_run(build_recipe(base, write_rows(tmp_path), tmp_path, {"kind": "lora", "r": 2}))
    exported = export_model(ExportRequest(tmp_path / "lora", tmp_path / "adapter"))
    assert read_metadata(exported.folder)["license"] == "mit"


def test_bad_requests_are_refused(finished_run: Callable[[str], Path], tmp_path: Path) -> None:
    """Each error is one sentence with the remedy, and nothing is written."""
    run = finished_run("lora")
    with pytest.raises(MissingFileError, match="does not exist"):
        export_model(ExportRequest(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match=r"has no record\.json"):
        export_model(ExportRequest(tmp_path / "empty"))
    with pytest.raises(OutputError, match="exists; give another folder"):
        export_model(ExportRequest(run, tmp_path / "empty"))
    with pytest.raises(OutOfRangeError, match="add --merge, or omit --dtype"):
        export_model(ExportRequest(run, tmp_path / "new", dtype="bf16"))
    lock = Lock(run)
    lock.acquire()
    try:
        with pytest.raises(RunLockedError):
            export_model(ExportRequest(run, tmp_path / "new"))
    finally:
        lock.release()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outcome": {"kind": "oom"}}, "ended with the outcome oom"),
        ({"started_at": "2020-01-01T00:00:00+00:00"}, "has no saved model of the training"),
    ],
)
def test_unfinished_run_is_refused(
    change: dict[str, object], message: str, finished_run: Callable[[str], Path], tmp_path: Path
) -> None:
    """A run without a result, or with the model of another training, has nothing to export."""
    run = tmp_path / "run"
    shutil.copytree(finished_run("lora"), run)
    record = json.loads((run / "record.json").read_bytes()) | change
    (run / "record.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ModelNotFoundError, match=message):
        export_model(ExportRequest(run, tmp_path / "new"))


def test_adapter_of_a_stacked_run_needs_a_merge(finished_run: Callable[[str], Path], tmp_path: Path) -> None:
    """The base of such an adapter exists as a run only. A merged export names the first base model."""
    rows = write_rows(tmp_path)
    train_run(build_recipe(finished_run("lora"), rows, tmp_path, {"kind": "lora", "r": 2}, name="second"))
    with pytest.raises(MergeError, match=r"belongs to the model of the run .* add --merge"):
        export_model(ExportRequest(tmp_path / "second", tmp_path / "adapter"))
    exported = export_model(ExportRequest(tmp_path / "second", tmp_path / "merged", merge=True))
    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    assert "after the runs lora" in card
