"""The fair protocol: the same tokens, order and steps for every method, whatever is spared, cut or padded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peftbench.common.filesystem import CACHE_DIR_ENV
from peftbench.data.batches import GlobalBatch
from peftbench.methods.base import Method
from peftbench.training import loop
from tests.helpers.batches import shown
from tests.helpers.methods import ONE_OF_EACH, every_method
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from peftbench.record import RunRecord

STEPS, EXAMPLES, BATCH = 5, 24, 6
"""One pass over the examples, and a step of another."""

Setting = dict[str, dict[str, Any]]
"""Knobs of the recipe's parts."""

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
"""What may change how fast a run is, and how much memory it takes, and nothing else; the first is held up as right."""
STORED: dict[str, Setting] = {
    "over stored states": {"train": {"feature_cache": "fp32"}},
    "over stored states, padded": {
        "data": {"padding": "longest"},
        "train": {"feature_cache": "fp32", "micro_batch_size": 1},
    },
}
"""The same, for a trunk that is frozen."""

Step = list[tuple[int, tuple[list[int], list[int]]]]
"""Which examples a step was given, each with its tokens and their labels, by their numbers."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own."""
    monkeypatch.setenv(CACHE_DIR_ENV, str(tmp_path / "cache"))


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[GlobalBatch]:
    """Every global batch that a run has trained on, as the loop was given it."""
    given: list[GlobalBatch] = []
    step: Callable[..., float] = loop.train_step

    def kept(accelerator: Any, trainer: Any, batch: GlobalBatch, *rest: Any) -> float:
        given.append(batch)
        return step(accelerator, trainer, batch, *rest)

    monkeypatch.setattr(loop, "train_step", kept)
    return given


def run(workshop: Workshop, method: Method, setting: Setting, given: list[GlobalBatch]) -> tuple[RunRecord, list[Step]]:
    """The record of a run, and what its steps were given."""
    train = {"steps": STEPS, "global_batch_size": BATCH} | setting.get("train", {})
    given.clear()
    record = workshop.run(workshop.recipe(method, data=setting.get("data"), train=train))
    assert record.outcome.kind == "ok"
    return record, [of_step(batch, method.virtual_tokens) for batch in given]


def of_step(batch: GlobalBatch, virtual_tokens: int) -> Step:
    """What was given, however it was cut."""
    parts = (zip(part.example_indices, shown(part, virtual_tokens), strict=True) for part in batch.micro_batches)
    return sorted(example for part in parts for example in part)


def protocol(record: RunRecord) -> tuple[int, int, int, int, int | None]:
    """Real, labelled and virtual tokens, steps, and FLOPs that are required."""
    assert record.tokens is not None
    tokens = record.tokens
    return tokens.real, tokens.labelled, tokens.virtual, record.steps, record.flops.model_flops


def settings_of(method: Method) -> dict[str, Setting]:
    """All that may be set otherwise for it."""
    return SETTINGS | (STORED if method.has_frozen_backbone else {})


def test_one_of_the_methods_has_a_frozen_trunk() -> None:
    """Or the settings over stored states would be of no method."""
    assert any(method.has_frozen_backbone for method in ONE_OF_EACH.values())


@every_method
def test_no_setting_changes_what_is_trained_on(
    method: Method, workshop: Workshop, trained_on: list[GlobalBatch]
) -> None:
    """Tokens, examples of each step, steps, required FLOPs and losses are the same, though what is computed is not."""
    found = {name: run(workshop, method, setting, trained_on) for name, setting in settings_of(method).items()}
    plain, steps = found["packed"]
    assert len(steps) == STEPS == plain.steps
    assert plain.flops.model_flops
    for name, (record, of_steps) in found.items():
        assert protocol(record) == protocol(plain), name
        assert of_steps == steps, name
        assert record.step_losses == pytest.approx(plain.step_losses, rel=1e-5, abs=0), name
    executed = {record.flops.hardware_flops for record, _ in found.values()}
    assert None not in executed
    assert len(executed) >= 4, "what the settings change is counted"
    padded = {name: record.tokens.padded for name, (record, _) in found.items() if record.tokens is not None}
    assert padded["packed"] < padded["padded to the longest"] < padded["padded to max_tokens"]
    cuts = {
        name: record.engine.gradient_accumulation_steps
        for name, (record, _) in found.items()
        if record.engine is not None
    }
    assert (cuts["packed"], cuts["one by one"]) == (1, BATCH)
    assert 1 < cuts["by tokens"] < BATCH


def test_methods_differ_in_virtual_tokens_alone(workshop: Workshop, trained_on: list[GlobalBatch]) -> None:
    """In tokens, steps and the examples of each, with all that can be spared and with nothing."""
    nothing_spared: Setting = {"data": {"padding": "max_length"}, "train": {"logits": "all", "micro_batch_size": 1}}
    expected, steps = run(workshop, ONE_OF_EACH["full"], nothing_spared, trained_on)
    drawn = [number for step in steps for number, _ in step]
    assert sorted(drawn[:EXAMPLES]) == list(range(EXAMPLES))
    real, labelled, _, count, _ = protocol(expected)
    for method in ONE_OF_EACH.values():
        spared = STORED["over stored states"] if method.has_frozen_backbone else SETTINGS["packed"]
        for setting in (nothing_spared, spared):
            record, of_steps = run(workshop, method, setting, trained_on)
            virtual = STEPS * BATCH * method.virtual_tokens
            assert protocol(record)[:4] == (real, labelled, virtual, count), method.kind
            assert of_steps == steps, method.kind
