"""Training on stored states of frozen lower blocks gives the same losses and weights to the last bit."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from peftbench.common.filesystem import CACHE_DIR_ENV
from peftbench.common.units import format_bytes
from peftbench.data.batches import Batches
from peftbench.errors import UnsupportedModelError
from peftbench.feature_cache.cached_training import CachedFeatureLoss
from peftbench.feature_cache.cut import BlockCut, HeadCut, build_cut
from peftbench.feature_cache.store import StoreLayout, open_store
from peftbench.methods.select import Select
from peftbench.methods.select_presets import Attention, BitFit, Embeddings, LastBlocks
from peftbench.methods.selection import ParameterSelection, find_blocks
from peftbench.modeling.activation_checkpointing import enable_checkpointing
from peftbench.modeling.loss import build_loss
from peftbench.optim import AdamW
from peftbench.profiler.flop_counter import FlopCounter
from peftbench.recipe.schema import Checkpoint, Profile, Recipe
from tests.helpers.architectures import PLAIN, TINY_CONFIGS, VOCABULARY, build_tiny_model
from tests.helpers.batches import LENGTHS_AND_PROMPTS, micro_batch, packed
from tests.helpers.gpu import forbid_gpu_sync
from tests.helpers.models import FAMILIES, gpt2_config, llama_config, random_base
from tests.helpers.sweeps import mark_others_slow, mark_slow
from tests.helpers.training import trainable_parameters
from tests.helpers.workshop import Workshop
from tests.unit.run.test_interval_evaluation import read_curve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftbench.data.collate import MicroBatch
    from peftbench.record import RunRecord

EXAMPLES, EPOCHS, BATCH = 24, 3, 6
BF16_TOLERANCE = 2e-4
"""Allowed relative difference between losses with bf16 and with float32 states: three times the measured one."""
NORM_AND_HEAD = Select(train=r"transformer\.ln_f\..*|lm_head\.weight", untie_head=True)
CUTS: dict[str, tuple[ParameterSelection, int]] = {
    "last_block": (LastBlocks(), 3),
    "three_blocks": (LastBlocks(num_blocks=3), 1),
    "one_bias": (Select(train=r".*\.2\..*ln_2\.bias"), 2),
    "last_attention": (Select(train=r"transformer\.h\.3\.attn\..*"), 3),
    "norm": (Select(train=r"transformer\.ln_f\..*"), 4),
    "norm_and_head": (NORM_AND_HEAD, 4),
    "block_and_head": (Select(train=r"transformer\.h\.3\..*|lm_head\.weight", untie_head=True), 3),
}
"""Selections of a GPT-2 of four blocks, with the number of frozen blocks below them."""
SEVERAL_LISTS_OF_BLOCKS = {"hrm_text"}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache folder of this test, empty at first."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_DIR_ENV, str(folder))
    return folder


@pytest.fixture
def equal_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the examples of each epoch in the same order, so that products of later epochs have the same shapes.

    A product of other shapes may round its rows differently.
    """

    def cycle(batches: Batches) -> Iterator[int]:
        return itertools.cycle(range(len(batches.dataset)))

    monkeypatch.setattr(Batches, "sample_indices", cycle)


def recipe(workshop: Workshop, name: str, stored: str | None, method: ParameterSelection, **parts: Any) -> Recipe:
    """Return a recipe for three epochs, in two micro-batches per step."""
    train = {
        "steps": None,
        "epochs": EPOCHS,
        "global_batch_size": BATCH,
        "micro_batch_size": 3,
        "feature_cache": stored,
    }
    values: dict[str, Any] = {
        "optimizer": AdamW(learning_rate=1e-3),
        "profile": Profile(untimed_steps=1),
        "save_model": True,
    }
    return workshop.recipe(method, train=train | parts.pop("train", {}), name=name, **values | parts)


def run(workshop: Workshop, name: str, stored: str | None, method: ParameterSelection, **parts: Any) -> RunRecord:
    """Run such a recipe."""
    record = workshop.run(recipe(workshop, name, stored, method, **parts))
    assert record.outcome.kind == "ok", record.outcome
    return record


def load_weights(workshop: Workshop, name: str) -> dict[str, torch.Tensor]:
    """Return the model that a run saved."""
    return load_file(workshop.output / name / "model" / "model.safetensors")


def assert_equal_to_the_last_bit(workshop: Workshop, records: list[RunRecord]) -> None:
    """Check losses, held-out losses, weights and all counts, except hardware FLOPs."""
    first, *others = records
    steps = EXAMPLES // BATCH
    assert sum(first.step_losses[-steps:]) < sum(first.step_losses[:steps])
    for record in others:
        assert record.step_losses == first.step_losses
        assert record.quality is not None
        assert first.quality is not None
        assert record.quality.loss == first.quality.loss
        assert record.tokens == first.tokens
        assert record.flops.model_flops == first.flops.model_flops
        weights, expected = load_weights(workshop, record.name), load_weights(workshop, first.name)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def assert_counted(record: RunRecord) -> None:
    """Check that the FLOPs counted in a step equal the closed form to the last integer."""
    assert record.flops.counted_step is not None
    assert record.flops.counted_step.counted_flops == record.flops.counted_step.closed_form_flops


SETTINGS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"data": {"padding": "longest"}},
    "bf16": {"train": {"precision": "bf16"}},
    "padded_bf16": {"train": {"precision": "bf16"}, "data": {"padding": "longest"}},
    "dropout": {"model": {"dropout": 0.1}},
    "checkpointing": {"train": {"gradient_checkpointing": True}, "model": {"dropout": 0.1}},
    "masked": {"model": {"attention": "eager"}, "data": {"padding": "longest"}},
    "all_logits": {"train": {"logits": "all"}},
    "float32_weights": {"train": {"precision": "bf16"}, "model": {"dtype": "fp32"}},
}


@pytest.mark.usefixtures("equal_epochs")
@pytest.mark.parametrize(
    ("architecture", "setting"),
    mark_slow(
        [
            (architecture, setting)
            for architecture in FAMILIES
            for setting in SETTINGS
            if "dropout" not in str(SETTINGS[setting]) or architecture == "gpt2_tied"
        ],
        lambda point: point in {("gpt2_tied", "packed"), ("gpt2_tied", "dropout"), ("llama_tied", "padded_bf16")},
        seed=31,
    ),
)
def test_losses_equal_those_without_a_cache_to_the_last_bit(
    architecture: str, setting: str, workshop: Workshop
) -> None:
    """Train the last block without a cache, with a new store, and with a complete one, which skips the lower block."""
    parts = {"architecture": architecture} | SETTINGS[setting]
    names = {"plain": None, "first": "fp32", "second": "fp32"}
    records = [run(workshop, name, stored, LastBlocks(), **parts) for name, stored in names.items()]
    assert_equal_to_the_last_bit(workshop, records)
    for record in records:
        assert_counted(record)
    plain, first, second = (record.flops.hardware_flops for record in records)
    assert plain is not None
    assert first is not None
    assert second is not None
    assert plain - second == EPOCHS * (first - second) > 0  # the first run skips two of three epochs


@pytest.mark.parametrize("padding", ["free", pytest.param("longest", marks=pytest.mark.slow)])
def test_losses_equal_those_without_a_cache_up_to_rounding(padding: str, workshop: Workshop) -> None:
    """In random order, later epochs combine examples into other micro-batches than the first epoch."""
    parts = {"data": {"padding": padding}}
    plain, cached, second = (
        run(workshop, f"{index}", stored, LastBlocks(), **parts) for index, stored in enumerate((None, "fp32", "fp32"))
    )
    assert cached.step_losses == pytest.approx(plain.step_losses, rel=1e-6, abs=0)
    assert second.step_losses == cached.step_losses


def test_states_in_bf16_change_losses_within_the_tolerance(workshop: Workshop) -> None:
    """Computed states are rounded like stored ones, so that both runs with a cache are equal to the last bit."""
    plain, first, second = (
        run(workshop, f"{index}", stored, LastBlocks()) for index, stored in enumerate((None, "bf16", "bf16"))
    )
    assert first.step_losses == pytest.approx(plain.step_losses, rel=BF16_TOLERANCE, abs=0)
    assert first.step_losses != plain.step_losses
    assert second.step_losses == first.step_losses


def test_record_notes_the_frozen_blocks(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """The note has the size of all real positions; the size is logged before the store is created, once."""
    first, second = (run(workshop, name, "bf16", LastBlocks()) for name in ("first", "second"))
    assert first.tokens is not None
    positions = first.tokens.real // EPOCHS
    message = f"hidden states of {positions:,} real positions take {format_bytes(positions * 64 * 2)} in "
    for record, num_cached in ((first, 0), (second, EXAMPLES)):
        (note,) = (note for note in record.notes if "hidden states" in note)
        assert note.startswith(message)
        assert f"in bf16: {num_cached} of 24 examples were cached before the first step" in note
        assert note.endswith("frozen: the lowest 1 of 2 blocks")
    assert capsys.readouterr().err.count(message) == 1


def test_selections_above_one_cut_share_a_store(workshop: Workshop, cache_folder: Path) -> None:
    """A run that trains other parameters above the same blocks reads the states of the first run."""
    methods = (LastBlocks(), Select(train=r"transformer\.h\.1\.attn\..*"), Select(train=r"transformer\.h\.1\.ln_2\..*"))
    records = [run(workshop, f"{index}", "fp32", method) for index, method in enumerate(methods)]
    cached = [next(note for note in record.notes if "hidden states" in note) for record in records]
    assert ["in fp32: 24 of 24 examples" in note for note in cached] == [False, True, True]
    assert len(list(cache_folder.glob("feature_cache/*/features"))) == 1
    run(workshop, "norm", "fp32", Select(train=r"transformer\.ln_f\..*"))
    assert len(list(cache_folder.glob("feature_cache/*/features"))) == 2


@pytest.mark.usefixtures("equal_epochs")
@pytest.mark.parametrize("checkpoint_step", [2, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("store_deleted", [False, True])
def test_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(
    checkpoint_step: int, store_deleted: bool, workshop: Workshop, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resume in the first or second epoch, with dropout in the trained block, with the existing store or a new one."""
    from tests.unit.feature_cache.test_cached_training import run_until_first_checkpoint

    parts: dict[str, Any] = {"model": {"dropout": 0.1}}
    plain = run(workshop, "plain", None, LastBlocks(), **parts)
    run_recipe = recipe(
        workshop, "resumed", "fp32", LastBlocks(), checkpoint=Checkpoint(interval=checkpoint_step), **parts
    )
    run_until_first_checkpoint(run_recipe, monkeypatch)
    if store_deleted:
        shutil.rmtree(cache_folder)
    resumed = workshop.run(run_recipe)
    assert resumed.resumed_after == (checkpoint_step,)
    assert_equal_to_the_last_bit(workshop, [plain, resumed])


def test_micro_batch_tokens_and_interval_evaluation_do_not_change_losses(workshop: Workshop) -> None:
    """Micro-batches limited by tokens are the same, and an evaluation between steps does not use the store."""
    parts: dict[str, Any] = {
        "train": {"micro_batch_size": None, "micro_batch_tokens": 120},
        "evaluate": {"interval": 3},
        "model": {"dropout": 0.1},
    }
    plain, cached = (run(workshop, f"{stored}", stored, LastBlocks(), **parts) for stored in (None, "fp32"))
    assert cached.step_losses == pytest.approx(plain.step_losses, rel=1e-6, abs=0)
    assert len(read_curve(cached)) == 4
    assert [loss for _, loss in read_curve(cached)] == pytest.approx([loss for _, loss in read_curve(plain)], rel=1e-6)


@pytest.mark.slow
def test_compiled_blocks_are_skipped(workshop: Workshop) -> None:
    """Compiled lower blocks run in the first epoch only, and losses stay within rounding."""
    parts: dict[str, Any] = {"train": {"compile": True}}
    plain, first, second = (
        run(workshop, f"{index}", stored, LastBlocks(), **parts) for index, stored in enumerate((None, "fp32", "fp32"))
    )
    assert first.step_losses == pytest.approx(plain.step_losses, rel=1e-5, abs=0)
    assert second.step_losses == first.step_losses


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Embeddings(), r"transformer\.wte\.weight, below all blocks, is trained"),
        (Select(train=r".*wpe\.weight"), r"transformer\.wpe\.weight, below all blocks, is trained"),
        (Select(train=r"lm_head\.weight"), r"transformer\.wte\.weight, below all blocks, is trained"),
        (LastBlocks(num_blocks=2), r"transformer\.h\.0\.ln_1\.weight, in the first block, is trained"),
        (BitFit(), r"transformer\.h\.0\.ln_1\.bias, in the first block, is trained"),
        (Attention(), r"transformer\.h\.0\.attn\.c_attn\.weight, in the first block, is trained"),
    ],
)
def test_selection_without_frozen_lower_blocks_is_refused(
    method: ParameterSelection, message: str, workshop: Workshop
) -> None:
    """The error names the lowest trained parameter; no store and no run folder is created."""
    with pytest.raises(UnsupportedModelError, match=rf"{message}; train only later blocks.*feature_cache=null"):
        workshop.run(recipe(workshop, "run", "fp32", method))


def build_cached_loss(base: PreTrainedModel, method: ParameterSelection, **options: Any) -> CachedFeatureLoss:
    """Apply a method and return the loss with an empty store of four examples."""
    part = method.get_frozen_part(method.apply(base, None))  # type: ignore[arg-type]
    method.set_training(base)
    loss, _ = build_loss(base, **options)
    cut = build_cut(base, part, loss)
    lengths = {
        "labeled": [end - prompt for end, prompt in LENGTHS_AND_PROMPTS],
        "real": [n for n, _ in LENGTHS_AND_PROMPTS],
    }
    layout = StoreLayout(torch.tensor(lengths[cut.position_kind]), cut.hidden_size, "fp32", cut.position_kind)
    return CachedFeatureLoss(loss, open_store({"part": part.name}, layout, lambda _: None), cut)


def with_mode(batch: MicroBatch, mode: Any) -> MicroBatch:
    """Return the batch of the four examples with a feature mode."""
    return replace(batch, example_indices=(0, 1, 2, 3), feature_mode=mode)


def compute(loss: CachedFeatureLoss, batch: MicroBatch) -> tuple[torch.Tensor, list[torch.Tensor], int | None]:
    """Return the loss, the gradients of all trained parameters, and the FLOPs counted."""
    loss.base.zero_grad()
    torch.manual_seed(5)  # of dropout
    with loss.attention_context(), FlopCounter() as counter:
        value = loss(loss.base, batch)
        value.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in trainable_parameters(loss.base).values()]
    return value.detach(), [gradient for gradient in gradients if gradient is not None], counter.total_flops


@pytest.mark.parametrize("batch", [packed(), micro_batch()], ids=["packed", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CUTS)
def test_gradients_are_equal_in_every_mode(name: str, checkpointing: bool, batch: MicroBatch) -> None:
    """Loss and gradients of a step with loaded states equal those of a computed one; only the upper blocks run."""
    method, num_frozen = CUTS[name]
    base = random_base(gpt2_config(n_layer=4, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1))
    loss = build_cached_loss(base, method)
    assert isinstance(loss.cut, BlockCut)
    if checkpointing:
        enable_checkpointing(base)
    runs: list[int] = []
    for index, (_, block) in enumerate(find_blocks(base)):
        block.get_submodule("ln_1").register_forward_hook(lambda *_, index=index: runs.append(index))
    results = {}
    for mode in ("recompute", "save", "load"):
        runs.clear()
        results[mode] = compute(loss, with_mode(batch, mode))
        assert sorted(set(runs)) == list(range(num_frozen if mode == "load" else 0, 4))
    for value, gradients, _ in results.values():
        assert torch.equal(value, results["recompute"][0])
        assert gradients
        assert all(map(torch.equal, gradients, results["recompute"][1]))


def test_head_alone_uses_labeled_positions(fresh_base: Callable[[str], PreTrainedModel]) -> None:
    """A selection of an untied head is cut like last_layer: its store has the labeled positions."""
    loss = build_cached_loss(fresh_base("gpt2_tied"), Select(train=r"lm_head\.weight", untie_head=True))
    assert isinstance(loss.cut, HeadCut)
    assert loss.store.layout.num_positions == sum(end - prompt for end, prompt in LENGTHS_AND_PROMPTS)


@pytest.mark.parametrize("use_masks", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("case", mark_others_slow({case: case for case in TINY_CONFIGS}, "gpt2"))
def test_every_architecture_is_equal_over_stored_states(case: str, use_masks: bool) -> None:
    """A cache hit changes nothing. Loss and gradients equal those without a cache.

    In padded rows of a mixture of experts, gradients are equal up to rounding: padding reaches other experts.
    """
    base = build_tiny_model(case)
    if case in SEVERAL_LISTS_OF_BLOCKS:
        with pytest.raises(UnsupportedModelError, match="needs a model with one list of transformer blocks"):
            build_cached_loss(base, LastBlocks())
        return
    loss = build_cached_loss(base, LastBlocks(), labeled_only=False, use_masks=use_masks)
    is_padded = loss.uses_masks  # some need masks in every run
    batch = micro_batch() if is_padded else packed()
    batch = replace(batch, input_ids=batch.input_ids % VOCABULARY, targets=batch.targets % VOCABULARY)
    plain, saved, loaded = (compute(loss, with_mode(batch, mode)) for mode in ("recompute", "save", "load"))
    assert torch.equal(saved[0], loaded[0])
    assert all(map(torch.equal, saved[1], loaded[1]))
    assert torch.equal(plain[0], loaded[0])
    has_experts = "expert" in " ".join(name for name, _ in base.named_parameters())
    for gradient, expected in zip(loaded[1], plain[1], strict=True):
        if is_padded and has_experts:
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(gradient, expected)


def build_gemma(kind: str, num_shared: int) -> PreTrainedModel:
    """Return a Gemma of four blocks; the last ``num_shared`` read the keys and values of lower blocks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values: dict[str, Any] = PLAIN | {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "global_head_dim": 8,
        "laurel_rank": 4,
        "sliding_window": 8,
        "num_kv_shared_layers": num_shared,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    }
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))  # type: ignore[no-any-return]


def test_inputs_of_each_layer_are_those_of_the_model() -> None:
    """Gemma 4 passes an embedding to each block; it is computed in every step."""
    loss = build_cached_loss(build_gemma("gemma4_text", 0), LastBlocks(num_blocks=2), labeled_only=False)
    batch = micro_batch()
    batch = replace(batch, input_ids=batch.input_ids % VOCABULARY, targets=batch.targets % VOCABULARY)
    plain, saved, loaded = (compute(loss, with_mode(batch, mode)) for mode in ("recompute", "save", "load"))
    assert torch.equal(plain[0], loaded[0])
    assert torch.equal(saved[0], loaded[0])


@pytest.mark.parametrize(("kind", "num_shared"), [("gemma4_text", 2), ("gemma3n_text", 0)])
def test_architecture_that_passes_more_than_hidden_states_is_refused(kind: str, num_shared: int) -> None:
    """Gemma 4's upper blocks read keys and values of lower ones; Gemma 3n has several streams of hidden states."""
    with pytest.raises(UnsupportedModelError, match=rf"cannot replace the lower blocks of {kind} .*feature_cache=null"):
        build_cached_loss(build_gemma(kind, num_shared), LastBlocks())


def test_states_that_bypass_the_cut_are_refused() -> None:
    """If a block reads inner values of a lower block, loaded states give other logits."""
    base = random_base(llama_config())
    blocks = [block for _, block in find_blocks(base)]
    shared: list[torch.Tensor] = [torch.zeros(())]
    blocks[0].mlp.register_forward_hook(lambda _module, _args, output: shared.append(output.mean()))  # type: ignore[union-attr,arg-type]
    blocks[1].mlp.register_forward_hook(lambda _module, _args, output: output + shared.pop())  # type: ignore[union-attr,arg-type]
    with pytest.raises(UnsupportedModelError, match=r"cannot replace the lower blocks of llama .*feature_cache=null"):
        build_cached_loss(base, LastBlocks())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", [packed(), micro_batch()], ids=["packed", "padded"])
def test_loading_states_to_a_gpu_does_not_synchronize(dtype: torch.dtype | None, batch: MicroBatch) -> None:
    """Loss and gradients equal those of computed states, without a host-device synchronization."""
    base = random_base(gpt2_config(n_layer=4)).eval().cuda()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        loss = build_cached_loss(base, LastBlocks())
    results = []
    for mode, may_wait in (("recompute", True), ("save", True), ("load", True), ("load", False)):
        on_gpu = with_mode(batch, mode).to(torch.device("cuda"))
        torch.cuda.synchronize()
        base.zero_grad()
        with nullcontext() if may_wait else forbid_gpu_sync(), loss.attention_context():
            with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                value = loss(base, on_gpu)
            value.backward()  # type: ignore[no-untyped-call]
        results.append(
            (value.item(), [p.grad.clone() for p in trainable_parameters(base).values() if p.grad is not None])
        )
    for value_found, gradients in results[1:]:
        assert value_found == pytest.approx(results[0][0], rel=1e-6)
        for gradient, expected in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
