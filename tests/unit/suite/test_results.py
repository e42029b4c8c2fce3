"""A suite's existing results: a run that resolved auto on another device has none on this one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from peftbench.distributed.device_capability import DeviceCapability
from peftbench.methods.full import Full
from peftbench.methods.lora import Lora
from peftbench.recipe.schema import Recipe
from peftbench.run_dir.layout import RunDir
from peftbench.suite import results
from peftbench.suite.results import ResultFinder, resolve_for_accelerate_config
from peftbench.suite.slurm_jobs import _has_result
from peftbench.tasks.auto import Auto
from peftbench.training.auto_settings import resolve_for_launch
from tests.helpers.paths import REPOSITORY
from tests.helpers.records import minimal_record
from tests.helpers.workshop import Workshop

H100 = DeviceCapability.from_compute_capability((9, 0))
T4 = DeviceCapability.from_compute_capability((7, 5))


@pytest.fixture
def recipe(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Return a recipe in auto precision that finished in float32 on a CPU."""
    recipe = workshop.recipe(Full(), model={"attention": "auto"}, train={"precision": "auto"})
    use_device(monkeypatch, DeviceCapability("cpu"))
    resolved, _ = resolve_for_launch(recipe)
    values = {"recipe_fingerprint": resolved.fingerprint(), "data_fingerprint": recipe.data.source.fingerprint()}
    minimal_record(name=recipe.name, **values).write(RunDir.from_recipe(recipe).path)
    return recipe


def use_device(monkeypatch: pytest.MonkeyPatch, device: DeviceCapability) -> None:
    """Resolve auto for ``device``."""
    for module in ("peftbench.distributed.device_capability", "peftbench.training.auto_settings"):
        monkeypatch.setattr(f"{module}.detect_device_capability", lambda **_: device)


def test_run_finished_in_float32_is_not_finished_for_an_h100(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record counts where auto resolves to the recorded precision, and nowhere else."""
    assert ResultFinder().find_existing_result(recipe) is not None
    use_device(monkeypatch, H100)
    assert ResultFinder().find_existing_result(recipe) is None
    assert ResultFinder().find_matching_record(recipe) is None


def test_resolved_record_equals_that_of_the_explicit_precision(recipe: Recipe) -> None:
    """A recipe that sets fp32 and sdpa has the same fingerprint, so its record is the same result."""
    train = recipe.train.model_copy(update={"precision": "fp32"})
    model = recipe.model.model_copy(update={"attention": "sdpa"})
    explicit = recipe.model_copy(update={"train": train, "model": model})
    assert explicit.with_resolved_dtype().fingerprint() == resolve_for_launch(recipe)[0].fingerprint()
    assert ResultFinder().find_existing_result(explicit) is not None


def test_explicit_recipe_keeps_its_result_without_its_model(workshop: Workshop, tmp_path: Path) -> None:
    """The folder of the model was moved; only ``auto`` settings would need it."""
    recipe = workshop.recipe(Full(), model={"path": str(tmp_path / "moved")})
    fingerprint = recipe.with_resolved_dtype().fingerprint()
    values = {"recipe_fingerprint": fingerprint, "data_fingerprint": recipe.data.source.fingerprint()}
    minimal_record(name=recipe.name, **values).write(RunDir.from_recipe(recipe).path)
    assert ResultFinder().find_existing_result(recipe) is not None


def test_result_of_a_stored_quantization_is_found(workshop: Workshop, tmp_path: Path) -> None:
    """The recipe has null, and the record has the quantization of the folder."""
    folder = tmp_path / "stored"
    shutil.copytree(workshop.base_folder("llama_untied"), folder)
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    recipe = workshop.recipe(Lora(r=2), model={"path": str(folder)})
    resolved, _ = resolve_for_launch(recipe)
    assert resolved.model.quantization == "nf4"
    values = {"recipe_fingerprint": resolved.fingerprint(), "data_fingerprint": recipe.data.source.fingerprint()}
    path = RunDir.from_recipe(recipe).path
    minimal_record(name=recipe.name, recipe=resolved.model_dump(mode="json"), **values).write(path)
    assert ResultFinder().find_existing_result(recipe) is not None
    assert _has_result(recipe)
    assert not _has_result(resolved)


def test_job_may_resolve_its_task_and_the_type_of_frozen_weights(workshop: Workshop) -> None:
    """A finished record of these values counts; without a device or columns to decide them, the data has changed."""
    explicit = workshop.recipe(Lora(r=2)).with_resolved_dtype()
    recipe = explicit.model_copy(update={"task": Auto()})
    values = {"recipe_fingerprint": explicit.fingerprint(), "data_fingerprint": "changed"}
    path = RunDir.from_recipe(recipe).path
    minimal_record(name=recipe.name, recipe=explicit.model_dump(mode="json"), **values).write(path)
    assert _has_result(recipe)
    assert not _has_result(explicit)
    assert not _has_result(workshop.recipe(Lora(r=2)))
    auto = {"train": explicit.train.model_copy(update={"precision": "auto"})}
    assert _has_result(workshop.recipe(Lora(r=2)).model_copy(update=auto))


def test_recipe_without_a_record_is_not_resolved(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolving takes seconds, and needs the model's config."""
    monkeypatch.setattr(results, "resolve_for_accelerate_config", None)
    assert ResultFinder().find_existing_result(workshop.recipe(Full(), train={"precision": "auto"})) is None


def test_recipe_that_cannot_be_resolved_has_no_result(recipe: Recipe, tmp_path: Path) -> None:
    """The run itself reports that its model is missing."""
    moved = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(tmp_path / "none")})})
    assert ResultFinder().find_existing_result(moved) is None


@pytest.mark.parametrize(
    ("config", "device", "expected"),
    [("zero2", T4, "fp32"), ("ddp", T4, "fp16"), ("zero2", H100, "bf16"), ("cpu2", None, "fp32")],
)
def test_engine_of_the_accelerate_config_decides(
    config: str,
    device: DeviceCapability | None,
    expected: str,
    workshop: Workshop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a T4, ZeRO trains in float32 and DDP in fp16; a config that requests the CPU is resolved for the CPU."""
    recipe = workshop.recipe(Full(), train={"precision": "auto", "global_batch_size": 8})
    if device is not None:
        use_device(monkeypatch, device)
    else:
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("peftbench.distributed.device_capability._has_bf16_instructions", lambda: False)
    resolved = resolve_for_accelerate_config(recipe, REPOSITORY / "accel_configs" / f"{config}.yaml")
    assert resolved.train.precision == expected
