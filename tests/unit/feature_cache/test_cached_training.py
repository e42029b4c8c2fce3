"""Training over cached hidden states gives the same losses and weights with fewer FLOPs."""

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
from peftbench.common.units import format_bytes
from peftbench.distributed.accelerator import build_accelerator
from peftbench.errors import DiskFullError, UnsupportedModelError
from peftbench.feature_cache.cached_training import CachedFeatureBatches, CachedFeatureLoss
from peftbench.feature_cache.cut import HeadCut
from peftbench.feature_cache.store import StoreLayout, open_store
from peftbench.methods.last_layer import LastLayer
from peftbench.modeling.loss import LabeledLogitsLoss, build_loss
from peftbench.recipe.schema import Checkpoint, Recipe
from peftbench.record import RunRecord
from peftbench.run.runner import Run
from peftbench.training.checkpoint import CheckpointManager
from tests.helpers.batches import LENGTHS_AND_PROMPTS, micro_batch, packed
from tests.helpers.cached_training import BATCH, EPOCHS, recipe
from tests.helpers.disks import mount_tmpfs
from tests.helpers.gpu import forbid_gpu_sync
from tests.helpers.models import FAMILIES
from tests.helpers.sweeps import mark_others_slow
from tests.helpers.training import build_adapted_model, build_training_components, reset_accelerators
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftbench.data.collate import MicroBatch
    from peftbench.training.build import AdaptedModel, TrainingComponents

EXAMPLES = 24
STEPS = EPOCHS * EXAMPLES // BATCH
HEAD = "lm_head.weight"
BF16_TOLERANCE = 4e-4
"""Allowed relative difference of losses over states in bf16 and in float32: three times the measured one.

The rounding error of a state is at most 0.4 % and has either sign, so most of it cancels.
"""


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache folder of this test, empty at first."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_DIR_ENV, str(folder))
    return folder


def load_head(workshop: Workshop, name: str) -> torch.Tensor:
    """Return the head's weight that a run saved."""
    return load_file(workshop.output / name / "model" / "model.safetensors")[HEAD]


def assert_equal_results(workshop: Workshop, record: RunRecord, expected: RunRecord, tolerance: float) -> None:
    """Check losses, the head's weight and all counts, except hardware FLOPs."""
    assert record.outcome.kind == expected.outcome.kind == "ok"
    assert record.step_losses[-1] < record.step_losses[0]
    assert record.step_losses == pytest.approx(expected.step_losses, rel=tolerance, abs=0)
    assert record.quality is not None
    assert expected.quality is not None
    assert record.quality.loss == pytest.approx(expected.quality.loss, rel=tolerance, abs=0)
    assert (record.tokens, record.steps, record.flops.model_flops) == (
        expected.tokens,
        STEPS,
        expected.flops.model_flops,
    )
    head, expected_head = load_head(workshop, record.name), load_head(workshop, expected.name)
    assert float((head - expected_head).norm()) <= 10 * tolerance * float(expected_head.norm())


@contextmanager
def record_skips(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Collect for each micro-batch of a training whether the backbone was skipped."""
    skips: list[bool] = []
    compute_loss = CachedFeatureLoss.__call__

    def compute_and_record(self: CachedFeatureLoss, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        entered_modules: list[int] = []
        handles = [
            module.register_forward_hook(lambda *_: entered_modules.append(1))
            for module in self.base.base_model.modules()
            if module is not self.base.base_model
        ]
        loss = compute_loss(self, model, batch)
        for handle in handles:
            handle.remove()
        skips.append(not entered_modules)
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(CachedFeatureLoss, "__call__", compute_and_record)
        yield skips


def head_flops(record: RunRecord) -> int:
    """Return the FLOPs of the head over all labeled positions: forward pass and weight gradient."""
    assert record.tokens is not None
    return 2 * 2 * 4096 * 64 * record.tokens.labeled


def build_run(run_recipe: Recipe, workshop: Workshop) -> tuple[AdaptedModel, TrainingComponents]:
    """Return what a run builds: the adapted model and the training components."""
    accelerator = build_accelerator(run_recipe, workshop.output).accelerator
    built = build_adapted_model(run_recipe, accelerator)
    return built, build_training_components(run_recipe, accelerator, built)


@pytest.mark.parametrize("padding", ["free", "longest"])
@pytest.mark.parametrize("architecture", mark_others_slow({name: name for name in FAMILIES}, "gpt2_tied"))
def test_cached_training_gives_equal_losses_with_fewer_flops(
    architecture: str, padding: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train for three epochs, then again over the stored states: the backbone runs in the first epoch only."""
    parts = {"architecture": architecture, "data": {"padding": padding}}
    plain = workshop.run(recipe(workshop, "plain", None, **parts))
    with record_skips(monkeypatch) as skips:
        first = workshop.run(recipe(workshop, "first", "fp32", **parts))
    assert skips == [False] * 8 + [True] * 16
    assert_equal_results(workshop, first, plain, 1e-6)
    with record_skips(monkeypatch) as skips:
        second = workshop.run(recipe(workshop, "second", "fp32", **parts))
    assert skips == [True] * 24
    assert_equal_results(workshop, second, first, 0.0)
    # In the first step, FLOPs counted at dispatch equal the closed form; the totals below are closed forms.
    for record in (plain, first, second):
        assert record.flops.counted_step is not None
        assert record.flops.counted_step.counted_flops == record.flops.counted_step.closed_form_flops
    assert plain.flops.hardware_flops is not None
    assert first.flops.hardware_flops is not None
    flops_of_head = head_flops(plain)
    assert second.flops.hardware_flops == flops_of_head
    if padding == "free":  # padded batches of different epochs differ in width
        assert (first.flops.hardware_flops - flops_of_head) * EPOCHS == plain.flops.hardware_flops - flops_of_head
    else:
        assert flops_of_head < first.flops.hardware_flops < plain.flops.hardware_flops


def test_record_notes_the_feature_cache(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a note has size, folder and number of cached examples, and that the size is logged once."""
    first, second = (workshop.run(recipe(workshop, name, "bf16")) for name in ("first", "second"))
    assert first.tokens is not None
    positions = first.tokens.labeled // EPOCHS
    size_message = f"hidden states of {positions:,} labeled positions take {format_bytes(positions * 64 * 2)} in "
    for record, num_cached in ((first, 0), (second, EXAMPLES)):
        (note,) = (note for note in record.notes if "hidden states" in note)
        assert note.startswith(size_message)
        assert f"in bf16: {num_cached} of 24 examples were cached before the first step" in note
    assert capsys.readouterr().err.count(size_message) == 1


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_bf16_states_keep_losses_within_tolerance(precision: str, workshop: Workshop) -> None:
    """Check losses over states stored in bf16; with bf16 arithmetic they equal those without a cache exactly.

    In that case the head rounds its input to bf16 anyway.
    """
    train = {"precision": precision}
    plain = workshop.run(recipe(workshop, "plain", None, train=train))
    first, second = (workshop.run(recipe(workshop, name, "bf16", train=train)) for name in ("first", "second"))
    assert_equal_results(workshop, first, plain, BF16_TOLERANCE if precision == "fp32" else 1e-6)
    assert (first.step_losses == plain.step_losses) is (precision == "bf16")
    assert_equal_results(workshop, second, first, 0.0)  # computed states are rounded like stored ones


def test_losses_are_equal_if_an_epoch_ends_within_a_step(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a micro-batch with one new example computes all of its examples, and each example is new once."""
    train = {"global_batch_size": 10, "micro_batch_size": 2, "epochs": None, "steps": 6}
    plain = workshop.run(recipe(workshop, "plain", None, train=train))
    with record_skips(monkeypatch) as skips:
        cached = workshop.run(recipe(workshop, "cached", "fp32", train=train))
    assert cached.step_losses == pytest.approx(plain.step_losses, rel=1e-6)
    assert skips[:10] == [False] * 10
    assert not all(skips[10:15])
    assert skips[15:] == [True] * 15


def test_cached_training_supports_micro_batch_tokens(workshop: Workshop) -> None:
    """Check that micro-batches limited by tokens are the same with and without a cache."""
    train = {"micro_batch_size": None, "micro_batch_tokens": 120}
    plain, cached = (workshop.run(recipe(workshop, f"{dtype}", dtype, train=train)) for dtype in (None, "fp32"))
    assert plain.engine is not None
    assert plain.engine.gradient_accumulation_steps > 1
    assert_equal_results(workshop, cached, plain, 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_loading_states_to_a_gpu_does_not_synchronize(
    dtype: torch.dtype | None, fresh_base: Callable[[str], PreTrainedModel]
) -> None:
    """Check that loss and head gradient equal those of computed states, without a host-device synchronization."""
    base = fresh_base("gpt2_tied").eval().cuda()
    LastLayer().apply(base, None)  # type: ignore[arg-type]
    loss, _ = build_loss(base)
    assert isinstance(loss, LabeledLogitsLoss)
    layout = StoreLayout(torch.tensor([length - prompt for length, prompt in LENGTHS_AND_PROMPTS]), 64, "fp32")
    cached_loss = CachedFeatureLoss(loss, open_store({}, layout, lambda _: None), HeadCut(loss))
    head = base.get_output_embeddings().weight
    results = []
    for mode, may_wait in (("recompute", True), ("save", True), ("load", True), ("load", False)):
        batch = _with_feature_mode(packed(), mode).to(torch.device("cuda"))
        torch.cuda.synchronize()
        base.zero_grad()
        with nullcontext() if may_wait else forbid_gpu_sync(), cached_loss.attention_context():
            with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                loss_sum = cached_loss(base, batch)
            loss_sum.backward()  # type: ignore[no-untyped-call]
        results.append((loss_sum.item(), head.grad.clone()))
    for value, gradient in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-5, atol=1e-6)


def run_until_first_checkpoint(run_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a recipe and interrupt it after its first checkpoint."""
    save = CheckpointManager.save

    def save_and_interrupt(*args: Any) -> None:
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointManager, "save", save_and_interrupt)
        reset_accelerators()
        assert Run(run_recipe).execute()[0].outcome.kind == "preempted"


@pytest.mark.parametrize("checkpoint_step", [2, 6], ids=["in_the_first_epoch", "in_the_second"])
@pytest.mark.parametrize("store_deleted", [False, True], ids=["store_exists", "store_deleted"])
def test_resumed_run_equals_an_uninterrupted_one(
    checkpoint_step: int,
    store_deleted: bool,
    workshop: Workshop,
    cache_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Resume from a checkpoint over the existing store, or over a new one after the store was deleted."""
    plain = workshop.run(recipe(workshop, "plain", None))
    run_recipe = recipe(workshop, "resumed", "fp32", checkpoint=Checkpoint(interval=checkpoint_step))
    run_until_first_checkpoint(run_recipe, monkeypatch)
    if store_deleted:
        shutil.rmtree(cache_folder)
    with record_skips(monkeypatch) as skips:
        resumed = workshop.run(run_recipe)
    assert resumed.resumed_after == (checkpoint_step,)
    assert_equal_results(workshop, resumed, plain, 1e-6)
    computed = [not skipped for skipped in skips]
    assert sum(computed[:8]) == (8 if store_deleted else 2 * max(0, 4 - checkpoint_step))


def test_capped_logits_and_head_hooks_apply_to_stored_states(fresh_base: Callable[[str], PreTrainedModel]) -> None:
    """Check that a cap on the logits and a hook on the input of the head apply to saved and loaded states."""
    base = fresh_base("gpt2_tied").eval()
    base.requires_grad_(False)
    forward = base.forward

    def forward_with_cap(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if output.logits.dim():
            output.logits = 3 * torch.tanh(output.logits / 3)
        return output

    base.forward = forward_with_cap
    base.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    loss, _ = build_loss(base)
    layout = StoreLayout(torch.tensor([length - prompt for length, prompt in LENGTHS_AND_PROMPTS]), 64, "fp32")
    for batch in (packed(), micro_batch()):
        with loss.attention_context():
            expected = loss(base, batch)
    assert isinstance(loss, LabeledLogitsLoss)
    cached_loss = CachedFeatureLoss(loss, open_store({}, layout, lambda _: None), HeadCut(loss))
    with cached_loss.attention_context():
        saved = cached_loss(base, _with_feature_mode(packed(), "save"))
        loaded = cached_loss(base, _with_feature_mode(packed(), "load"))
        assert cached_loss(base, packed()) == saved == loaded
    assert float(saved) == pytest.approx(float(expected), rel=1e-6)


def _with_feature_mode(batch: MicroBatch, mode: Any) -> MicroBatch:
    return replace(batch, example_indices=(0, 1, 2, 3), feature_mode=mode)


def test_evaluation_does_not_write_to_the_store(workshop: Workshop) -> None:
    """Check that the backbone computes batches that are not training batches, and that the store stays empty."""
    run_recipe = recipe(workshop, "run", "fp32")
    built, trainer = build_run(run_recipe, workshop)
    assert isinstance(trainer.batches, CachedFeatureBatches)
    assert trainer.feature_store is not None
    with torch.no_grad(), built.loss.attention_context():
        loss = built.loss(built.model, packed())
        assert trainer.loss(trainer.model, packed()) == loss
    assert not trainer.feature_store.completed_mask().any()


def test_feature_modes_are_equal_in_each_iteration(workshop: Workshop) -> None:
    """Check that an iteration over the batches does not change the modes of the next one."""
    _, trainer = build_run(recipe(workshop, "run", "fp32"), workshop)
    modes = []
    for _ in range(2):
        batches = trainer.batches.skip_first_batches(0)
        modes.append([part.feature_mode for _ in range(8) for part in next(batches).micro_batches])
    assert modes[0] == modes[1] == ["save"] * 8 + ["load"] * 8


def test_model_without_a_separate_backbone_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the error has the model type and the key to change."""
    run_recipe = recipe(workshop, "run", "fp32")
    accelerator = build_accelerator(run_recipe, workshop.output).accelerator
    built = build_adapted_model(run_recipe, accelerator)
    monkeypatch.setattr(type(built.base.model), "base_model", property(lambda base: base), raising=False)
    with pytest.raises(
        UnsupportedModelError, match=r"gpt2 has no backbone separate from its head.*train.feature_cache=null"
    ):
        build_training_components(run_recipe, accelerator, built)


def test_full_disk_fails_before_the_run_folder_is_created(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the error has the sizes, and that no file of the cache or the run is left."""
    with mount_tmpfs(tmp_path / "disk", "size=16k") as disk:
        monkeypatch.setenv(CACHE_DIR_ENV, str(disk))
        with pytest.raises(DiskFullError, match=r"take 54 KiB in .* has 16 KiB free; free some space"):
            workshop.run(recipe(workshop, "run", "fp32"))
        assert not list(disk.iterdir())
    assert not (workshop.output / "run").exists()
