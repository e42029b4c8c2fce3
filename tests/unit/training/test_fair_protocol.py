"""Fair comparison: every method and every performance setting trains on the same tokens, order and steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peftbench.common.filesystem import CACHE_DIR_ENV
from peftbench.data.batches import GlobalBatch
from peftbench.methods.base import Method
from peftbench.training import loop
from tests.helpers.batches import list_tokens_and_labels
from tests.helpers.methods import ONE_OF_EACH, one_method_fast
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from peftbench.record import RunRecord

STEPS, EXAMPLES, BATCH = 5, 24, 6
"""One epoch, and one step of the next."""

Setting = dict[str, dict[str, Any]]
"""Keys of the recipe, by section."""

SETTINGS: dict[str, Setting] = {
    "packed": {"data": {"padding": "free"}},
    "packed to a multiple": {"data": {"padding": "free", "pad_to_multiple_of": 32}},
    "padded to a multiple": {
        "data": {"padding": "longest", "pad_to_multiple_of": 16},
        "train": {"micro_batch_size": 2},
    },
    "padded to the longest": {"data": {"padding": "longest"}, "train": {"micro_batch_size": 2}},
    "padded to max_tokens": {"data": {"padding": "max_length"}},
    "logits everywhere": {"train": {"logits": "all"}},
    "logits everywhere, padded": {"data": {"padding": "longest"}, "train": {"logits": "all"}},
    "by tokens": {"train": {"micro_batch_tokens": 120}},
    "by tokens, padded": {"data": {"padding": "longest"}, "train": {"micro_batch_tokens": 120}},
    "one by one": {"train": {"micro_batch_size": 1}},
}
"""Settings that change only speed and memory; the first is the reference."""
FEATURE_CACHE_SETTINGS: dict[str, Setting] = {
    "feature cache": {"train": {"feature_cache": "fp32"}},
    "feature cache, padded": {
        "data": {"padding": "longest"},
        "train": {"feature_cache": "fp32", "micro_batch_size": 1},
    },
}
"""The same, for methods with a frozen backbone."""

Step = list[tuple[int, tuple[list[int], list[int]]]]
"""Examples of a step: index, tokens and labels of each, sorted by index."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own cache."""
    monkeypatch.setenv(CACHE_DIR_ENV, str(tmp_path / "cache"))


@pytest.fixture
def trained_batches(monkeypatch: pytest.MonkeyPatch) -> list[GlobalBatch]:
    """Return a list to which the training loop appends every global batch."""
    batches: list[GlobalBatch] = []
    original_step: Callable[..., float] = loop.train_step

    def record_batch(accelerator: Any, trainer: Any, batch: GlobalBatch, *rest: Any, **kwargs: Any) -> float:
        batches.append(batch)
        return original_step(accelerator, trainer, batch, *rest, **kwargs)

    monkeypatch.setattr(loop, "train_step", record_batch)
    return batches


def run(
    workshop: Workshop, method: Method, setting: Setting, trained_batches: list[GlobalBatch]
) -> tuple[RunRecord, list[Step]]:
    """Train with a setting; return the record and the examples of each step."""
    train = {"steps": STEPS, "global_batch_size": BATCH} | setting.get("train", {})
    trained_batches.clear()
    record = workshop.run(workshop.recipe(method, data=setting.get("data"), train=train))
    assert record.outcome.kind == "ok"
    return record, [examples_of(batch, method.virtual_tokens) for batch in trained_batches]


def examples_of(batch: GlobalBatch, virtual_tokens: int) -> Step:
    """Return the examples of a global batch, for any split into micro-batches."""
    parts = (
        zip(part.example_indices, list_tokens_and_labels(part, virtual_tokens), strict=True)
        for part in batch.micro_batches
    )
    return sorted(example for part in parts for example in part)


def protocol(record: RunRecord) -> tuple[int, int, int, int, int | None]:
    """Return real, labeled and virtual tokens, steps, and model FLOPs."""
    assert record.tokens is not None
    tokens = record.tokens
    return tokens.real, tokens.labeled, tokens.virtual, record.steps, record.flops.model_flops


def settings_of(method: Method) -> dict[str, Setting]:
    """Return all settings that the method supports."""
    return SETTINGS | (FEATURE_CACHE_SETTINGS if method.has_frozen_backbone else {})


def test_one_method_has_a_frozen_backbone() -> None:
    """Otherwise no method would use the feature cache settings."""
    assert any(method.has_frozen_backbone for method in ONE_OF_EACH.values())


@one_method_fast("last_layer")
def test_performance_settings_do_not_change_the_training(
    method: Method, workshop: Workshop, trained_batches: list[GlobalBatch]
) -> None:
    """Tokens, examples of each step, steps, model FLOPs and losses are equal, although hardware FLOPs differ."""
    runs = {name: run(workshop, method, setting, trained_batches) for name, setting in settings_of(method).items()}
    plain, steps = runs["packed"]
    assert len(steps) == STEPS == plain.steps
    assert plain.flops.model_flops
    for name, (record, examples) in runs.items():
        assert protocol(record) == protocol(plain), name
        assert examples == steps, name
        assert record.step_losses == pytest.approx(plain.step_losses, rel=1e-5, abs=0), name
    executed = {record.flops.hardware_flops for record, _ in runs.values()}
    assert None not in executed
    assert len(executed) >= 4, "the settings change the hardware FLOPs"
    padded = {name: record.tokens.padded for name, (record, _) in runs.items() if record.tokens is not None}
    assert padded["packed"] < padded["padded to the longest"] < padded["padded to max_tokens"]
    accumulation_steps = {
        name: record.engine.gradient_accumulation_steps
        for name, (record, _) in runs.items()
        if record.engine is not None
    }
    assert (accumulation_steps["packed"], accumulation_steps["one by one"]) == (1, BATCH)
    assert 1 < accumulation_steps["by tokens"] < BATCH


def test_methods_train_on_the_same_data_except_virtual_tokens(
    workshop: Workshop, trained_batches: list[GlobalBatch]
) -> None:
    """Tokens, steps and the examples of each step are equal, with the slowest and the fastest setting."""
    slow: Setting = {"data": {"padding": "max_length"}, "train": {"logits": "all", "micro_batch_size": 1}}
    expected, steps = run(workshop, ONE_OF_EACH["full"], slow, trained_batches)
    indices = [index for step in steps for index, _ in step]
    assert sorted(indices[:EXAMPLES]) == list(range(EXAMPLES))
    real, labeled, _, count, _ = protocol(expected)
    for method in ONE_OF_EACH.values():
        fast = FEATURE_CACHE_SETTINGS["feature cache"] if method.has_frozen_backbone else SETTINGS["packed"]
        for setting in (slow, fast):
            record, examples = run(workshop, method, setting, trained_batches)
            virtual = STEPS * BATCH * method.virtual_tokens
            assert protocol(record)[:4] == (real, labeled, virtual, count), method.kind
            assert examples == steps, method.kind
