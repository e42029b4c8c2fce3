"""Which engine was asked for, and what a DeepSpeed file may not say."""

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


def test_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, several, or torch's fully_shard in its second version alone."""
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
    with pytest.raises(EngineError, match="FSDP version 1 was asked for"):
        detect_requested_engine(None)


def test_an_engine_that_is_not_in_the_table() -> None:
    """ZeRO in an arrangement that nobody tests is refused, with those that there are."""
    unknown = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(EngineError, match=r"ZeRO stage 1 with optimizer states on 'cpu'.*zero2_offload"):
        detect_requested_engine(unknown)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DeepSpeed file that a launcher named."""
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
def test_a_file_that_says_what_the_recipe_owns(key: str, value: object, asked: Path, workshop: Workshop) -> None:
    """One sentence, before anything has started."""
    asked.write_text(json.dumps(ZERO2 | {key: value}), encoding="utf-8")
    with pytest.raises(EngineError, match=f"the DeepSpeed file (sets|has) {key}.*the recipe's"):
        build_accelerator(workshop.recipe(Full()), workshop.output)


def test_a_file_that_is_not_there_or_is_none(asked: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path depends on the folder one is in, which is said."""
    with pytest.raises(MissingFileError, match=r"there is no DeepSpeed file .*ds\.json; its path is read from"):
        build_accelerator(workshop.recipe(Full()), workshop.output)
    asked.write_text("{", encoding="utf-8")
    with pytest.raises(EngineError, match=r"ds\.json is not JSON"):
        build_accelerator(workshop.recipe(Full()), workshop.output)
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    with pytest.raises(EngineError, match="DeepSpeed was asked for without a file"):
        build_accelerator(workshop.recipe(Full()), workshop.output)


def test_what_cannot_run_is_refused_before_it_starts(asked: Path, workshop: Workshop) -> None:
    """Before any process has spoken to another."""
    asked.write_text(json.dumps(ZERO2), encoding="utf-8")
    with pytest.raises(CombinationError, match=r"full with optimizer\.kind=galore in fp32 does not run on zero2"):
        build_accelerator(workshop.recipe(Full(), optimizer=GaLore()), workshop.output)


def test_the_recipe_s_numbers_are_written_in(asked: Path) -> None:
    """As DeepSpeed counts them; no clipping is 0 there, and left alone it would be 1."""
    asked.write_text(json.dumps(ZERO2), encoding="utf-8")
    for clip, written in ((0.7, 0.7), (None, 0.0)):
        made = deepspeed.build_plugin(
            micro_batch_size=3,
            gradient_accumulation_steps=2,
            world_size=4,
            max_grad_norm=clip,
            offload_dir=Path("nowhere"),
        ).deepspeed_config
        assert made["gradient_clipping"] == written
        assert (made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (3, 2)
        assert made["train_batch_size"] == 24


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", r"_checkpointing \(true\).*train\.gradient_checkpointing=true"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", r"dynamo_config \(INDUCTOR\), which is no engine.*take it out"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", r"parallelism_config \(true\)"),
    ],
)
def test_an_accelerate_file_that_changes_what_is_computed(
    variable: str, value: str, said: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a launcher made of it is refused in a sentence."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(EngineError, match=said):
        build_accelerator(workshop.recipe(Full()), workshop.output)
    monkeypatch.setenv(variable, "false" if value == "true" else "NO")
    build_accelerator(workshop.recipe(Full()), workshop.output)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("stage", "two", "1, 2 or 3"),
        ("stage", 4, "1, 2 or 3"),
        ("offload_optimizer", "cpu", 'a section, as {"device": "cpu"}'),
        ("reduce_bucket_size", "many", 'a number or "auto"'),
        ("stage3_prefetch_bucket_size", [], 'a number or "auto"'),
    ],
)
def test_a_file_with_values_of_another_type(
    key: str, value: object, said: str, asked: Path, workshop: Workshop
) -> None:
    """One sentence with what was given and what is allowed."""
    zero = ZERO2["zero_optimization"] | {key: value}
    asked.write_text(json.dumps(ZERO2 | {"zero_optimization": zero}), encoding="utf-8")
    sentence = f"sets zero_optimization.{key} to {value!r}; it must be {said}"
    with pytest.raises(EngineError, match=re.escape(sentence)):
        build_accelerator(workshop.recipe(Full()), workshop.output)


def test_a_compiled_model_is_not_what_was_asked_for(workshop: Workshop) -> None:
    """Whoever compiled it."""
    recipe = workshop.recipe(Full())
    bound = build_accelerator(recipe, workshop.output)
    model = torch.nn.Linear(2, 2)
    steps = torch.optim.AdamW(model.parameters())
    with pytest.raises(EngineError, match="engine 'OptimizedModule' instead of 'no wrapper'"):
        verify_engine_config(recipe, bound, torch.compile(model, backend="eager"), steps, steps)


def test_states_on_a_disk_lie_in_the_run_s_folder(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of them, and not where one happens to be; without libaio it is said what to install."""
    config = json.loads((REPOSITORY / "ds_configs" / "zero3_nvme.json").read_text(encoding="utf-8"))
    asked.write_text(json.dumps(config), encoding="utf-8")
    zero = deepspeed.build_plugin(
        micro_batch_size=1, gradient_accumulation_steps=1, world_size=1, max_grad_norm=None, offload_dir=Path("scratch")
    ).deepspeed_config["zero_optimization"]
    assert zero["offload_param"]["nvme_path"] == zero["offload_optimizer"]["nvme_path"] == "scratch"
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    with pytest.raises(EngineError, match=r"libaio-dev.*or use accel_configs/zero3_offload\.yaml"):
        deepspeed.check_nvme_support()


def test_a_file_without_zero(asked: Path, workshop: Workshop) -> None:
    """Names a file that has what is missing."""
    contents: tuple[object, ...] = ({"bf16": {"enabled": "auto"}}, [])
    for content in contents:
        asked.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(EngineError, match=r"no section zero_optimization; ds_configs/zero2\.json has one"):
            build_accelerator(workshop.recipe(Full()), workshop.output)


def test_what_did_not_start_as_asked_is_refused(workshop: Workshop) -> None:
    """Each difference is named, with both sides, before the first step."""
    recipe = workshop.recipe(Full(), train={"micro_batch_size": 3})
    bound = build_accelerator(recipe, workshop.output)
    model = torch.nn.Linear(2, 2)
    steps = torch.optim.AdamW(model.parameters())
    verify_engine_config(recipe, bound, model, steps, steps)
    bound.accelerator.gradient_accumulation_steps = 5
    other = torch.optim.SGD(model.parameters())
    said = r"accumulation 5 instead of 2, optimizer '.*SGD' instead of '.*AdamW'"
    with pytest.raises(EngineError, match=said):
        verify_engine_config(recipe, bound, model, other, steps)
    bound.accelerator.gradient_accumulation_steps = 2
    with pytest.raises(EngineError, match=r"fsdp2 did not start .*engine 'no wrapper' instead of 'FSDPModule'"):
        verify_engine_config(recipe, dataclasses.replace(bound, engine=FSDP2), model, steps, steps)
