"""Training over stored hidden states is training: the same losses and weights, and less computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftbench.engine.checkpoint import Checkpoints
from peftbench.files import CACHE_VARIABLE
from peftbench.methods.last_layer import LastLayer
from peftbench.optim import AdamW
from peftbench.recipe import Checkpoint, Profile, Recipe
from peftbench.record import RunRecord
from tests.conftest import FAMILIES, Workshop

EPOCHS = 3
EXAMPLES = 24
BATCH = 6
STEPS = EPOCHS * EXAMPLES // BATCH
HEAD = "lm_head.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


def recipe(workshop: Workshop, name: str, stored: str | None, **parts: Any) -> Recipe:
    """Three epochs of a head, in two micro-batches a step."""
    train = {"steps": None, "epochs": EPOCHS, "global_batch": BATCH, "micro_batch": 3, "trunk_cache": stored}
    parts = {"optimizer": AdamW(learning_rate=1e-2), "profile": Profile(warmup_steps=1)} | parts
    return workshop.recipe(
        LastLayer(), train=train | parts.pop("train", {}), name=name, save_model=True, **parts
    )  # fmt: skip


def head_of(workshop: Workshop, name: str) -> torch.Tensor:
    """What a run has trained."""
    return load_file(workshop.output / name / "model" / "model.safetensors")[HEAD]


def assert_alike(workshop: Workshop, found: RunRecord, expected: RunRecord, allowed: float) -> None:
    """Losses, of the held-out split too, counts, and the head: relative to what training has moved of it."""
    assert found.outcome.kind == expected.outcome.kind == "ok"
    assert found.losses == pytest.approx(expected.losses, rel=allowed)
    assert found.losses[-1] < found.losses[0]
    assert found.quality is not None
    assert expected.quality is not None
    assert found.quality.loss == pytest.approx(expected.quality.loss, rel=allowed)
    assert (found.tokens, found.steps, found.flops.required) == (expected.tokens, STEPS, expected.flops.required)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_it(architecture: str, workshop: Workshop) -> None:
    plain = workshop.run(recipe(workshop, "plain", None, architecture=architecture))
    kept = workshop.run(recipe(workshop, "kept", "fp32", architecture=architecture))
    print(plain.losses, kept.losses, [abs(a-b) for a,b in zip(plain.losses,kept.losses)])
    print((head_of(workshop, "plain")-head_of(workshop,"kept")).abs().max(), plain.flops, kept.flops, kept.notes)
    assert_alike(workshop, kept, plain, 1e-6)
    again = workshop.run(recipe(workshop, "again", "fp32", architecture=architecture))
    assert again.losses == kept.losses
    print(again.flops, again.notes)
