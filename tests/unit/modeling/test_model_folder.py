"""Folders that are not a base model: each error names the content of the folder and what to do."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from peftbench.cli.app import app
from peftbench.errors import ModelNotFoundError
from peftbench.memory.simulation.model import build_meta_model
from peftbench.modeling.loading import load_model
from peftbench.modeling.model_folder import find_file_fault
from peftbench.recipe.schema import Model
from tests.helpers.project import write_project

Folder = Callable[[str], Path]
Damage = Callable[[Path], None]
INDEX = "model.safetensors.index.json"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 548105171\n"


@pytest.fixture
def folder(base_folder: Folder, tmp_path: Path) -> Path:
    """Return a copy of an untied Llama's folder, which a test may damage."""
    return Path(shutil.copytree(base_folder("llama_untied"), tmp_path / "base"))


def _write(name: str, text: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    return damage


def _point(name: str) -> Damage:
    return _write(name, POINTER)


def _delete(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def _rename(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name)

    return damage


def _pickle(name: str) -> Damage:
    def damage(folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()

    return damage


def _split(folder: Path) -> None:
    """Split the weights into three files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    weight_map = {key: names[number % 3] for number, key in enumerate(weights)}
    for name in names:
        part = {key: weights[key] for key in weights if weight_map[key] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def _split_then(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        _split(folder)
        for one in damages:
            one(folder)

    return damage


def _cut(name: str, num_bytes: int | None = None) -> Damage:
    """Keep the first ``num_bytes`` of a file, half of it by default."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2 if num_bytes is None else num_bytes])

    return damage


def _replace_with_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def _append(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")


CONFIG_DAMAGES: dict[str, tuple[Damage, str]] = {
    "config is a pointer": (
        _point("config.json"),
        r"config\.json is a git-lfs pointer for 523 MiB.*run `git lfs pull`",
    ),
    "config is not JSON": (_write("config.json", "{ no"), r"config\.json is not valid JSON: .*line 1.*copy it again"),
    "config is empty": (_write("config.json", ""), r"config\.json is an empty file"),
    "config is an array": (_write("config.json", "[1]"), r"config\.json has a JSON array, but must have an object"),
    "config is null": (_write("config.json", "null"), r"config\.json has a JSON null"),
    "config is missing": (_delete("config.json"), r"no config\.json; it has generation_config\.json, model\.safet"),
    "adapter": (
        _write("adapter_config.json", '{"base_model_name_or_path": "gpt2"}'),
        r"has an adapter \(adapter_config\.json\), and peftbench starts from base models; set model\.path=gpt2",
    ),
    "adapter of an unknown base": (_write("adapter_config.json", "[]"), r"set model\.path to the adapter's base model"),
}
"""Damages of files that an estimate reads too."""
DAMAGES = CONFIG_DAMAGES | {
    "weights are a pointer": (
        _point("model.safetensors"),
        r"model\.safetensors is a git-lfs pointer.*`git lfs pull` in",
    ),
    "tokenizer is a pointer": (_point("tokenizer.json"), r"tokenizer\.json is a git-lfs pointer.*`git lfs pull` in"),
    "shard is a pointer": (
        _split_then(_point("model-00002-of-00003.safetensors")),
        r"model-00002-of-00003\.safetensors is a git-lfs pointer",
    ),
    "pickle is a pointer": (
        _split_then(
            _delete(INDEX, *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))), _point("pytorch_model.bin")
        ),
        r"pytorch_model\.bin is a git-lfs pointer",
    ),
    "no weights": (_delete("model.safetensors"), r"has no weights; put model\.safetensors there, or set model\.init"),
    "pickle": (
        _pickle("pytorch_model.bin"),
        r"weights in pytorch_model\.bin, .*convert them: python -c .*save_pretrained",
    ),
    "pickled shard": (_pickle("pytorch_model-00001-of-00001.bin"), r"weights in pytorch_model-00001-of-00001\.bin"),
    "gguf": (_rename("model-q4.gguf"), r"weights in model-q4\.gguf; set model\.path=.*model-q4\.gguf, the GGUF file"),
    "other name": (_rename("weights.safetensors"), r"has weights\.safetensors, but no model\.safetensors; rename it"),
    "shard without index": (
        _rename("model-00001-of-00002.safetensors"),
        r"has model-00001-of-00002\.safetensors, but no model\.safetensors\.index\.json; add",
    ),
    "missing shard": (
        _split_then(_delete("model-00003-of-00003.safetensors")),
        r"1 of the 3 weight files that .*index\.json names are missing: model-00003-of-00003\.safetensors; download",
    ),
    "truncated shard": (
        _split_then(_cut("model-00001-of-00003.safetensors")),
        r"model-00001-of-00003\.safetensors is truncated",
    ),
    "index without files": (_split_then(_write(INDEX, "{}")), r"index\.json names no weight files"),
    "index is not JSON": (_split_then(_cut(INDEX)), r"index\.json is not valid JSON"),
    "index is a pointer": (_split_then(_point(INDEX)), r"index\.json is a git-lfs pointer"),
    "truncated": (_cut("model.safetensors"), r"is truncated: it has [\d,]+ of [\d,]+ bytes; download or copy it again"),
    "truncated in the header": (_cut("model.safetensors", 100), r"is truncated: it has 100 of [\d,]+ bytes"),
    "truncated in the length": (_cut("model.safetensors", 5), r"is not a valid safetensors file: .*header too small"),
    "empty file": (_cut("model.safetensors", 0), r"model\.safetensors is an empty file"),
    "too long": (_append, r"is not a valid safetensors file"),
    "folder as weights": (_replace_with_folder, r"model\.safetensors is a folder, not a file of weights"),
    "tokenizer is not an object": (_write("tokenizer.json", "[]"), r"tokenizer\.json has a JSON array"),
    "tokenizer config is not JSON": (_cut("tokenizer_config.json"), r"tokenizer_config\.json is not valid JSON"),
    "generation config is a list": (
        _write("generation_config.json", "[]"),
        r"generation_config\.json has a JSON array",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folder_is_refused(name: str, folder: Path) -> None:
    """The error is one sentence with the path; an estimate gives the same one if it reads the file."""
    damage, expected = DAMAGES[name]
    damage(folder)
    with pytest.raises(ModelNotFoundError, match=expected) as raised:
        load_model(Model(path=str(folder)))
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)
    if name in CONFIG_DAMAGES:
        with pytest.raises(ModelNotFoundError) as planned:
            build_meta_model(Model(path=str(folder)), torch.float32)
        assert str(planned.value) == str(raised.value)


def test_split_weights_are_loaded(folder: Path) -> None:
    """An index with all its files is complete."""
    saved = load_file(folder / "model.safetensors")
    _split(folder)
    loaded = load_model(Model(path=str(folder))).model.state_dict()
    assert saved
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


def test_random_weights_need_no_weight_file(folder: Path) -> None:
    """A pointer in place of the weights is not read with init=random."""
    _point("model.safetensors")(folder)
    assert load_model(Model(path=str(folder), init="random")).fingerprint == "random weights"


def test_folder_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    """A file, an empty folder, and the parent of a model's folder are refused; the model inside is suggested."""
    (tmp_path / "empty").mkdir()
    expected = {
        folder / "model.safetensors": r"model\.path=.* is a file; set model\.path to the folder that contains",
        tmp_path / "empty": "empty is empty; put config.json, model.safetensors and tokenizer files there",
        tmp_path: rf"has no config\.json; set model\.path={folder}, which has one",
    }
    for path, sentence in expected.items():
        for load in (load_model, lambda model: build_meta_model(model, torch.float32)):
            with pytest.raises(ModelNotFoundError, match=sentence):
                load(Model(path=str(path)))


def test_file_as_tokenizer_is_refused(folder: Path) -> None:
    """The error names the key."""
    with pytest.raises(ModelNotFoundError, match=r"model\.tokenizer=.*tokenizer\.json is a file; set model\.tokenizer"):
        load_model(Model(path=str(folder), tokenizer=str(folder / "tokenizer.json")))


def test_estimate_prints_the_sentence_of_a_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command exits with the code of a missing model and has one line on standard error."""
    monkeypatch.chdir(write_project(tmp_path))
    _point("config.json")(folder)
    result = CliRunner().invoke(app, ["estimate", "recipe.yaml", f"model.path={folder}", "--device", "t4"])
    assert result.exit_code == ModelNotFoundError.exit_code
    assert result.stderr.startswith(f"error: {folder}/config.json is a git-lfs pointer")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_command_for_pickled_weights_converts_them(folder: Path, base_folder: Folder) -> None:
    """After the command in the error, the folder is loaded with the same weights."""
    expected = load_model(Model(path=str(base_folder("llama_untied")))).model.state_dict()
    _pickle("pytorch_model.bin")(folder)
    with pytest.raises(ModelNotFoundError) as raised:
        load_model(Model(path=str(folder)))
    command = shlex.split(str(raised.value).partition("convert them: ")[2])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    loaded = load_model(Model(path=str(folder))).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_pointer_is_recognized_by_its_content(tmp_path: Path) -> None:
    """A long text that mentions git-lfs is none; a pointer without a size is one."""
    for name, text, is_pointer in (
        ("a.model", POINTER, True),
        ("b.model", POINTER.partition("size")[0], True),
        ("c.model", f"see {POINTER}", False),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert (find_file_fault(tmp_path / name) is not None) is is_pointer
