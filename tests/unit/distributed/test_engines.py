"""The engine that a launch requests, and settings of its config files that are refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from peftbench.distributed import deepspeed
from peftbench.distributed.accelerator import build_accelerator, verify_engine_config
from peftbench.distributed.engines import DDP, FSDP2, SINGLE, detect_requested_engine
from peftbench.errors import CombinationError, EngineError, MissingFileError
from peftbench.methods.full import Full
from peftbench.optim import GaLore
from tests.helpers.paths import REPOSITORY
from tests.helpers.workshop import Workshop

ZERO2: dict[str, Any] = json.loads((REPOSITORY / "ds_configs" / "zero2.json").read_text(encoding="utf-8"))


def test_requested_engine_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is single, ddp or fsdp2; version 1 of FSDP is refused."""
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert detect_requested_engine(None) is SINGLE
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert detect_requested_engine(None) is DDP
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert detect_requested_engine(None) is FSDP2
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(EngineError, match=r"use accel_configs/zero3_offload\.yaml"):
        detect_requested_engine(None)
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(EngineError, match="sets fsdp_version: 1, which peftbench does not support"):
        detect_requested_engine(None)


def test_unsupported_deepspeed_config_is_refused() -> None:
    """The message lists the supported DeepSpeed engines."""
    unsupported = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(EngineError, match=r"ZeRO stage 1 with optimizer states on 'cpu'.*zero2_offload"):
        detect_requested_engine(unsupported)


@pytest.fixture
def deepspeed_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of the DeepSpeed config that the launcher names."""
    path = tmp_path / "ds.json"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    return path


OWNED = [
    ("gradient_clipping", 0.5),
    ("gradient_accumulation_steps", 4),
    ("train_micro_batch_size_per_gpu", 1),
    ("train_batch_size", 8),
    ("bf16", {"enabled": True}),
    ("optimizer", {"type": "AdamW"}),
    ("scheduler", {"type": "WarmupLR"}),
    ("torch_autocast", {"enabled": True}),
    ("communication_data_type", "bf16"),
    ("zero_optimization", {"stage": 2, "zero_quantized_gradients": True}),
]


@pytest.mark.parametrize(("key", "value"), OWNED, ids=[key for key, _ in OWNED])
def test_config_with_recipe_owned_keys_is_refused(
    key: str, value: object, deepspeed_config: Path, workshop: Workshop
) -> None:
    """The error is raised before any process starts."""
    deepspeed_config.write_text(json.dumps(ZERO2 | {key: value}), encoding="utf-8")
    with pytest.raises(
        EngineError, match=f"the DeepSpeed config sets (zero_optimization.)?{key}.*the recipe determines"
    ):
        build_accelerator(workshop.recipe(Full()), workshop.output)


def test_missing_or_malformed_config_is_refused(
    deepspeed_config: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message states that the path is relative to the current folder."""
    with pytest.raises(MissingFileError, match=r"DeepSpeed config .*ds\.json not found; the path is relative"):
        build_accelerator(workshop.recipe(Full()), workshop.output)
    deepspeed_config.write_text("{", encoding="utf-8")
    with pytest.raises(EngineError, match=r"ds\.json is not JSON"):
        build_accelerator(workshop.recipe(Full()), workshop.output)
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    with pytest.raises(EngineError, match="DeepSpeed was requested without a config file"):
        build_accelerator(workshop.recipe(Full()), workshop.output)


def test_unsupported_combination_is_refused_before_launch(deepspeed_config: Path, workshop: Workshop) -> None:
    """The error is raised before processes form a group."""
    deepspeed_config.write_text(json.dumps(ZERO2), encoding="utf-8")
    with pytest.raises(CombinationError, match=r"optimizer\.kind=galore does not run with zero2"):
        build_accelerator(workshop.recipe(Full(), optimizer=GaLore()), workshop.output)


def test_plugin_has_the_numbers_of_the_recipe(deepspeed_config: Path) -> None:
    """No clipping is 0 in DeepSpeed, whose default is 1."""
    deepspeed_config.write_text(json.dumps(ZERO2), encoding="utf-8")
    for max_grad_norm, expected in ((0.7, 0.7), (None, 0.0)):
        config = deepspeed.build_plugin(
            micro_batch_size=3,
            gradient_accumulation_steps=2,
            world_size=4,
            max_grad_norm=max_grad_norm,
            offload_dir=Path("nowhere"),
        ).deepspeed_config
        assert config["gradient_clipping"] == expected
        assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (3, 2)
        assert config["train_batch_size"] == 24


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", r"_checkpointing \(true\).*train\.gradient_checkpointing=true"),
        (
            "ACCELERATE_DYNAMO_BACKEND",
            "INDUCTOR",
            r"dynamo_config \(INDUCTOR\), which peftbench does not support; remove it",
        ),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", r"parallelism_config \(true\)"),
    ],
)
def test_accelerate_config_that_changes_the_computation_is_refused(
    variable: str, value: str, message: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that disable the setting are accepted."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(EngineError, match=message):
        build_accelerator(workshop.recipe(Full()), workshop.output)
    monkeypatch.setenv(variable, "false" if value == "true" else "NO")
    build_accelerator(workshop.recipe(Full()), workshop.output)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("stage", "two", "1, 2 or 3"),
        ("stage", 4, "1, 2 or 3"),
        ("offload_optimizer", "cpu", 'a section, e.g. {"device": "cpu"}'),
        ("reduce_bucket_size", "many", 'a number or "auto"'),
        ("stage3_prefetch_bucket_size", [], 'a number or "auto"'),
    ],
)
def test_config_with_wrong_types_is_refused(
    key: str, value: object, allowed: str, deepspeed_config: Path, workshop: Workshop
) -> None:
    """The message states the given value and the allowed ones."""
    zero = ZERO2["zero_optimization"] | {key: value}
    deepspeed_config.write_text(json.dumps(ZERO2 | {"zero_optimization": zero}), encoding="utf-8")
    message = f"sets zero_optimization.{key} to {value!r}; it must be {allowed}"
    with pytest.raises(EngineError, match=re.escape(message)):
        build_accelerator(workshop.recipe(Full()), workshop.output)


def test_compiled_model_is_refused(workshop: Workshop) -> None:
    """Only blocks are compiled, never the model."""
    recipe = workshop.recipe(Full())
    context = build_accelerator(recipe, workshop.output)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(EngineError, match="engine 'OptimizedModule' instead of 'no wrapper'"):
        verify_engine_config(recipe, context, torch.compile(model, backend="eager"), optimizer, optimizer)


def test_nvme_offload_uses_the_run_folder(deepspeed_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and optimizer states use it; if libaio is missing, the message names the package to install."""
    config = json.loads((REPOSITORY / "ds_configs" / "zero3_nvme.json").read_text(encoding="utf-8"))
    deepspeed_config.write_text(json.dumps(config), encoding="utf-8")
    zero = deepspeed.build_plugin(
        micro_batch_size=1, gradient_accumulation_steps=1, world_size=1, max_grad_norm=None, offload_dir=Path("offload")
    ).deepspeed_config["zero_optimization"]
    assert zero["offload_param"]["nvme_path"] == zero["offload_optimizer"]["nvme_path"] == "offload"
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    with pytest.raises(EngineError, match=r"libaio-dev.*or use accel_configs/zero3_offload\.yaml"):
        deepspeed.check_nvme_support()


def test_config_without_zero_section_is_refused(deepspeed_config: Path, workshop: Workshop) -> None:
    """The message names a config that has the section."""
    contents: tuple[object, ...] = ({"bf16": {"enabled": "auto"}}, [])
    for content in contents:
        deepspeed_config.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(EngineError, match=r"no section zero_optimization; see ds_configs/zero2\.json"):
            build_accelerator(workshop.recipe(Full()), workshop.output)


def test_settings_that_differ_from_the_recipe_are_refused(workshop: Workshop) -> None:
    """The message names each difference with both values."""
    recipe = workshop.recipe(Full(), train={"micro_batch_size": 3})
    context = build_accelerator(recipe, workshop.output)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    verify_engine_config(recipe, context, model, optimizer, optimizer)
    context.accelerator.gradient_accumulation_steps = 5
    other = torch.optim.SGD(model.parameters())
    message = r"gradient_accumulation_steps 5 instead of 2, optimizer '.*SGD' instead of '.*AdamW'"
    with pytest.raises(EngineError, match=message):
        verify_engine_config(recipe, context, model, other, optimizer)
    context.accelerator.gradient_accumulation_steps = 2
    with pytest.raises(EngineError, match=r"fsdp2 did not start .*engine 'no wrapper' instead of 'FSDPModule'"):
        verify_engine_config(recipe, dataclasses.replace(context, engine=FSDP2), model, optimizer, optimizer)
