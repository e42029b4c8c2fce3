"""Training over stored hidden states is training: the same losses and weights, and less computed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from peftbench.common.filesystem import CACHE_DIR_ENV
from peftbench.distributed.accelerator import build_accelerator
from peftbench.errors import DiskFullError, UnsupportedModelError
from peftbench.feature_cache.cached_training import CachedFeatureBatches, CachedFeatureLoss
from peftbench.feature_cache.store import StoreLayout, open_store
from peftbench.methods.last_layer import LastLayer
from peftbench.modeling.loss import LabelledLogitsLoss, build_loss
from peftbench.recipe.schema import Checkpoint, Recipe
from peftbench.record import RunRecord
from peftbench.run.runner import Run
from peftbench.training.checkpoint import CheckpointManager
from tests.helpers.batches import LENGTHS_AND_PROMPTS, micro_batch, packed
from tests.helpers.cached_training import BATCH, EPOCHS, recipe
from tests.helpers.disks import mounted
from tests.helpers.gpu import without_waiting
from tests.helpers.models import FAMILIES
from tests.helpers.training import built_from, forget_accelerators, trainer_from
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftbench.data.collate import MicroBatch
    from peftbench.training.build import AdaptedModel, TrainingComponents

EXAMPLES = 24
STEPS = EPOCHS * EXAMPLES // BATCH
HEAD = "lm_head.weight"
BF16_APART = 4e-4
"""How far, relatively, losses over states stored in bf16 may be from those over float32: three times what it was.

Each state is 0.004 off at most, and half of them to either side.
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_DIR_ENV, str(folder))
    return folder


def head_of(workshop: Workshop, name: str) -> torch.Tensor:
    """What a run has trained."""
    return load_file(workshop.output / name / "model" / "model.safetensors")[HEAD]


def assert_alike(workshop: Workshop, found: RunRecord, expected: RunRecord, allowed: float) -> None:
    """Losses, of the held-out split too, the head and all counts but what was executed."""
    assert found.outcome.kind == expected.outcome.kind == "ok"
    assert found.step_losses[-1] < found.step_losses[0]
    assert found.step_losses == pytest.approx(expected.step_losses, rel=allowed, abs=0)
    assert found.quality is not None
    assert expected.quality is not None
    assert found.quality.loss == pytest.approx(expected.quality.loss, rel=allowed, abs=0)
    assert (found.tokens, found.steps, found.flops.model_flops) == (expected.tokens, STEPS, expected.flops.model_flops)
    mine, theirs = head_of(workshop, found.name), head_of(workshop, expected.name)
    assert float((mine - theirs).norm()) <= 10 * allowed * float(theirs.norm())


@contextmanager
def trunk_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether the trunk was skipped, by micro-batch of a training."""
    calls: list[bool] = []
    call = CachedFeatureLoss.__call__

    def counted(self: CachedFeatureLoss, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        entered: list[int] = []
        handles = [
            module.register_forward_hook(lambda *_: entered.append(1))
            for module in self.base.base_model.modules()
            if module is not self.base.base_model
        ]
        loss = call(self, model, batch)
        for handle in handles:
            handle.remove()
        calls.append(not entered)
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(CachedFeatureLoss, "__call__", counted)
        yield calls


def of_the_head(record: RunRecord) -> int:
    """FLOPs of a vocabulary of 4096 times a width of 64, forward and for the weight, at each label."""
    assert record.tokens is not None
    return 2 * 2 * 4096 * 64 * record.tokens.labelled


def bound_to(made: Recipe, workshop: Workshop) -> tuple[AdaptedModel, TrainingComponents]:
    """What a run builds, and what its loop drives."""
    accelerator = build_accelerator(made, workshop.output).accelerator
    built = built_from(made, accelerator)
    return built, trainer_from(made, accelerator, built)


@pytest.mark.parametrize("padding", ["free", "longest"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_same_losses_and_weights_in_less_work(
    architecture: str, padding: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over three epochs, and again in a run that finds the store; the trunk is computed in the first epoch alone."""
    parts = {"architecture": architecture, "data": {"padding": padding}}
    plain = workshop.run(recipe(workshop, "plain", None, **parts))
    with trunk_calls(monkeypatch) as calls:
        first = workshop.run(recipe(workshop, "first", "fp32", **parts))
    assert calls == [False] * 8 + [True] * 16
    assert_alike(workshop, first, plain, 1e-6)
    with trunk_calls(monkeypatch) as calls:
        second = workshop.run(recipe(workshop, "second", "fp32", **parts))
    assert calls == [True] * 24
    assert_alike(workshop, second, first, 0.0)
    # What is executed: counted as it is dispatched in the first step, and in all steps that of the plan.
    for record in (plain, first, second):
        assert record.flops.counted_step is not None
        assert record.flops.counted_step.counted_flops == record.flops.counted_step.closed_form_flops
    assert plain.flops.hardware_flops is not None
    assert first.flops.hardware_flops is not None
    head = of_the_head(plain)
    assert second.flops.hardware_flops == head
    if padding == "free":  # a padded batch of the first epoch is of another width than one of the second
        assert (first.flops.hardware_flops - head) * EPOCHS == plain.flops.hardware_flops - head
    else:
        assert head < first.flops.hardware_flops < plain.flops.hardware_flops


def test_the_record_says_what_was_kept(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes and place, and how much was there; the size is told before, once."""
    first, second = (workshop.run(recipe(workshop, name, "bf16")) for name in ("first", "second"))
    assert first.tokens is not None
    positions = first.tokens.labelled // EPOCHS
    said = f"hidden states of {positions:,} labelled positions take {positions * 64 * 2:,} bytes in "
    for record, there in ((first, 0), (second, EXAMPLES)):
        (note,) = (note for note in record.notes if "hidden states" in note)
        assert note.startswith(said)
        assert f"in bf16: {there} of 24 examples were cached before the first step" in note
    assert capsys.readouterr().err.count(said) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_states_in_bf16(precision: str, workshop: Workshop) -> None:
    """Near those in float32; in bf16 arithmetic the same to the last bit, since the head rounds its input so anyway."""
    train = {"precision": precision}
    plain = workshop.run(recipe(workshop, "plain", None, train=train))
    first, second = (workshop.run(recipe(workshop, name, "bf16", train=train)) for name in ("first", "second"))
    assert_alike(workshop, first, plain, BF16_APART if precision == "fp32" else 1e-6)
    assert (first.step_losses == plain.step_losses) is (precision == "bf16")
    assert_alike(workshop, second, first, 0.0)  # computed or stored, a state is rounded


def test_an_epoch_that_ends_within_a_step(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A micro-batch with one new example computes all of its own; each example is new once."""
    train = {"global_batch_size": 10, "micro_batch_size": 2, "epochs": None, "steps": 6}
    plain = workshop.run(recipe(workshop, "plain", None, train=train))
    with trunk_calls(monkeypatch) as calls:
        kept = workshop.run(recipe(workshop, "kept", "fp32", train=train))
    assert kept.step_losses == pytest.approx(plain.step_losses, rel=1e-6)
    assert calls[:10] == [False] * 10
    assert not all(calls[10:15])
    assert calls[15:] == [True] * 15


def test_micro_batches_under_a_number_of_tokens(workshop: Workshop) -> None:
    """They are cut as without a store."""
    train = {"micro_batch_size": None, "micro_batch_tokens": 120}
    plain, kept = (workshop.run(recipe(workshop, f"{stored}", stored, train=train)) for stored in (None, "fp32"))
    assert plain.engine is not None
    assert plain.engine.gradient_accumulation_steps > 1
    assert_alike(workshop, kept, plain, 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_stored_states_reach_a_gpu_without_waiting(
    dtype: torch.dtype | None, fresh_base: Callable[[str], PreTrainedModel]
) -> None:
    """The loss and the head's gradient are those of states that were computed, and the host waits for nothing."""
    base = fresh_base("gpt2_tied").eval().cuda()
    LastLayer().apply(base, None)  # type: ignore[arg-type]
    loss, _ = build_loss(base)
    assert isinstance(loss, LabelledLogitsLoss)
    layout = StoreLayout(torch.tensor([length - prompt for length, prompt in LENGTHS_AND_PROMPTS]), 64, "fp32")
    over = CachedFeatureLoss(loss, open_store({}, layout, lambda _: None))
    head = base.get_output_embeddings().weight
    found = []
    for trunk, waits in (("recompute", True), ("save", True), ("load", True), ("load", False)):
        batch = _marked(packed(), trunk).to(torch.device("cuda"))
        torch.cuda.synchronize()
        base.zero_grad()
        with nullcontext() if waits else without_waiting(), over.attention_context():
            with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                summed = over(base, batch)
            summed.backward()  # type: ignore[no-untyped-call]
        found.append((summed.item(), head.grad.clone()))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-5, atol=1e-6)


def stopped(made: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run it until after its first checkpoint."""
    save = CheckpointManager.save

    def saved_and_stopped(*given: Any) -> None:
        save(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointManager, "save", saved_and_stopped)
        forget_accelerators()
        assert Run(made).execute()[0].outcome.kind == "preempted"


@pytest.mark.parametrize("at", [2, 6], ids=["in_the_first_epoch", "in_the_second"])
@pytest.mark.parametrize("lost", [False, True], ids=["store_kept", "store_lost"])
def test_it_goes_on_as_if_it_had_not_been_stopped(
    at: int,
    lost: bool,
    workshop: Workshop,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From a checkpoint: over the store that is there, or over one that must be made anew."""
    plain = workshop.run(recipe(workshop, "plain", None))
    made = recipe(workshop, "resumed", "fp32", checkpoint=Checkpoint(interval=at))
    stopped(made, monkeypatch)
    if lost:
        shutil.rmtree(cache)
    with trunk_calls(monkeypatch) as calls:
        resumed = workshop.run(made)
    assert resumed.resumed_after == (at,)
    assert_alike(workshop, resumed, plain, 1e-6)
    new = [not skipped for skipped in calls]
    assert sum(new[:8]) == (8 if lost else 2 * max(0, 4 - at))


def test_what_follows_a_head_is_done_over_stored_states_too(fresh_base: Callable[[str], PreTrainedModel]) -> None:
    """Where a model caps its logits, those of stored states are capped; a change between trunk and head is in them."""
    base = fresh_base("gpt2_tied").eval()
    base.requires_grad_(False)
    cap = base.forward

    def capped(*given: Any, **named: Any) -> Any:
        output = cap(*given, **named)
        if output.logits.dim():
            output.logits = 3 * torch.tanh(output.logits / 3)
        return output

    base.forward = capped
    base.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0] * 2, *given[1:]))
    loss, _ = build_loss(base)
    layout = StoreLayout(torch.tensor([length - prompt for length, prompt in LENGTHS_AND_PROMPTS]), 64, "fp32")
    for batch in (packed(), micro_batch()):
        with loss.attention_context():
            expected = loss(base, batch)
    over = CachedFeatureLoss(loss, open_store({}, layout, lambda _: None))  # type: ignore[arg-type]
    with over.attention_context():
        kept = over(base, _marked(packed(), "save"))
        stored = over(base, _marked(packed(), "load"))
        assert over(base, packed()) == kept == stored
    assert float(kept) == pytest.approx(float(expected), rel=1e-6)


def _marked(batch: MicroBatch, trunk: Any) -> MicroBatch:
    return replace(batch, example_indices=(0, 1, 2, 3), feature_mode=trunk)


def test_evaluation_writes_nothing(workshop: Workshop) -> None:
    """Batches that are not of the training pass the trunk, whatever their numbers, and leave the store as it is."""
    made = recipe(workshop, "run", "fp32")
    built, trainer = bound_to(made, workshop)
    assert isinstance(trainer.batches, CachedFeatureBatches)
    assert trainer.feature_store is not None
    with torch.no_grad(), built.loss.attention_context():
        loss = built.loss(built.model, packed())
        assert trainer.loss(trainer.model, packed()) == loss
    assert not trainer.feature_store.completed_mask().any()


def test_a_plan_is_the_same_each_time_it_is_asked(workshop: Workshop) -> None:
    """What one iteration over the batches has marked is not there in the next."""
    _, trainer = bound_to(recipe(workshop, "run", "fp32"), workshop)
    plans = []
    for _ in range(2):
        found = trainer.batches.skip_first_batches(0)
        plans.append([part.feature_mode for _ in range(8) for part in next(found).micro_batches])
    assert plans[0] == plans[1] == ["save"] * 8 + ["load"] * 8


def test_a_model_without_a_trunk_of_its_own(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be skipped, that is told."""
    made = recipe(workshop, "run", "fp32")
    accelerator = build_accelerator(made, workshop.output).accelerator
    built = built_from(made, accelerator)
    monkeypatch.setattr(type(built.base.model), "base_model", property(lambda base: base), raising=False)
    with pytest.raises(
        UnsupportedModelError, match=r"gpt2 has no backbone separate from its head.*train.feature_cache=null"
    ):
        trainer_from(made, accelerator, built)


def test_a_full_disk_ends_a_run_before_it_starts(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, and nothing of the run is left either."""
    with mounted(tmp_path / "disk", "size=16k") as disk:
        monkeypatch.setenv(CACHE_DIR_ENV, str(disk))
        with pytest.raises(DiskFullError, match=r"take 54,528 bytes in .* has 16,384 bytes free; free some space"):
            workshop.run(recipe(workshop, "run", "fp32"))
        assert not list(disk.iterdir())
    assert not (workshop.output / "run").exists()
