"""Selective tuning: which parameters are trained, where the backward pass ends, and what is refused."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from peftbench.errors import OutOfRangeError, TargetModulesError, UnsupportedModelError
from peftbench.methods import METHOD_FAMILIES, METHODS
from peftbench.methods.base import Method
from peftbench.methods.select import Select
from peftbench.methods.select_presets import Attention, BitFit, Embeddings, LastBlocks, LayerNorm
from peftbench.methods.selection import find_blocks
from peftbench.modeling.activation_checkpointing import enable_checkpointing
from tests.helpers.architectures import TINY_CONFIGS, build_tiny_model
from tests.helpers.batches import logits, micro_batch
from tests.helpers.methods import PRESETS
from tests.helpers.models import embeddings_of, gpt2_config, head_of, llama_config, meta_base, random_base
from tests.helpers.sweeps import mark_slow
from tests.helpers.training import summed_loss, trainable_parameters
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CASES = [case for case in TINY_CONFIGS if "," not in case]
REFUSED = {
    "layer_norm": {"hrm_text", "nanochat", "olmo"},  # their normalizations have no weights
    "last_blocks": {"hrm_text"},  # it has two lists of blocks
    "attention": {"recurrent_gemma"},  # its two layers have none
}
"""Architectures without what a preset trains. Those that bitfit refuses have no name with "bias"."""
FAST = {"gpt2", "llama", "laguna", "hrm_text", "bloom"}


def apply(method: Method, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name."""
    return trainable_parameters(method.apply(base, tokenizer))


def test_last_layer_is_a_preset() -> None:
    """It shares the family of select with all presets, and represents it in the compatibility table."""
    assert METHOD_FAMILIES["select"] == ("last_layer", "select", *PRESETS)
    assert {kind for kinds in METHOD_FAMILIES.values() for kind in kinds} == set(METHODS)


def test_expression_matches_full_names(tokenizer: PreTrainedTokenizerBase) -> None:
    """A part of a name does not match, as in target_modules of lora."""
    assert set(apply(Select(train=r".*\.ln_[12]\.bias"), random_base(gpt2_config()), tokenizer)) == {
        f"transformer.h.{block}.ln_{number}.bias" for block in (0, 1) for number in (1, 2)
    }


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("transformer.h.0.atn.c_attn.bias", r"did you mean 'transformer\.h\.0\.attn\.c_attn\.bias'\?"),
        ("zzz", r"allowed: transformer\.wte\.weight, .*transformer\.h\.0\.mlp\.c_proj\.bias, .*lm_head\.weight$"),
        ("attn", r"write \.\*\(attn\)\.\* to match a part"),
    ],
)
def test_expression_without_a_match_is_refused(train: str, message: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """The message has the nearest name, one name for all blocks, or the expression that matches a part of a name."""
    base = meta_base(gpt2_config())
    method = Select(train=train)
    for action in (method.trainable_parameters, method.list_notes, lambda base: method.apply(base, tokenizer)):
        with pytest.raises(TargetModulesError, match=rf"'{train}' matches no full name of a parameter.*{message}"):
            action(base)
    assert all(parameter.requires_grad for parameter in base.parameters())  # the model is unchanged


@pytest.mark.parametrize(("train", "message"), [("ln(", "invalid regular expression"), ("", "at least one parameter")])
def test_invalid_expression_is_refused(train: str, message: str) -> None:
    """The error is raised before a model is loaded."""
    with pytest.raises(ValueError, match=message):
        Select(train=train)


def test_more_blocks_than_the_model_has_are_refused() -> None:
    """The message has the number of blocks."""
    with pytest.raises(OutOfRangeError, match=r"num_blocks=3 is more than the 2 blocks of this gpt2; set it to 2"):
        LastBlocks(num_blocks=3).trainable_parameters(meta_base(gpt2_config()))


def test_model_without_biases_is_refused() -> None:
    """The message names a preset that this model supports."""
    with pytest.raises(UnsupportedModelError, match=r"this llama has no biases to train; use method\.kind=layer_norm"):
        BitFit().trainable_parameters(meta_base(llama_config()))


def test_method_that_trains_nothing_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without a trained parameter fails, whatever the method's own checks."""
    monkeypatch.setattr(Select, "select_names", lambda *_: [])
    with pytest.raises(UnsupportedModelError, match=r"method\.kind=select trains no parameter of this gpt2"):
        workshop.run(workshop.recipe(Select(train="x")))


@pytest.mark.parametrize("method", [Select(train=r"lm_head\.weight"), Select(train=r".*wte\.weight"), Embeddings()])
def test_tied_matrix_is_trained_once_with_a_note(method: Method, tokenizer: PreTrainedTokenizerBase) -> None:
    """Either name selects the shared matrix; an untied model has no note."""
    base = random_base(gpt2_config())
    assert method.list_notes(base) == [
        "transformer.wte.weight and lm_head.weight are one tied parameter, so that training it changes all of them"
    ]
    assert method.trainable_parameters(base) == embeddings_of(base).numel()
    assert set(apply(method, base, tokenizer)) == {"transformer.wte.weight"}
    assert head_of(base) is embeddings_of(base)
    untied = meta_base(llama_config(tie_word_embeddings=False))
    assert Select(train=r".*(embed_tokens|lm_head)\.weight").list_notes(untied) == []


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        (Select(train=r"lm_head\.weight", untie_head=True), "head"),
        (Select(train=r".*wte\.weight", untie_head=True), "embedding"),
        (Embeddings(untie_head=True), "embedding"),
    ],
)
def test_untied_head_separates_the_two(
    method: Method, trained: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """One of two equal matrices is trained; the model starts at the base's logits and is saved untied."""
    base = random_base(gpt2_config()).eval()
    with torch.no_grad():
        expected = logits(base, micro_batch())
    assert method.list_notes(base) == []
    assert method.trainable_parameters(base) == embeddings_of(base).numel()
    (parameter,) = apply(method, base, tokenizer).values()
    assert parameter is (head_of(base) if trained == "head" else embeddings_of(base))
    assert head_of(base) is not embeddings_of(base)
    with torch.no_grad():
        assert torch.equal(logits(base, micro_batch()), expected)
        parameter.add_(1.0)
        changed = logits(base, micro_batch())
    method.save(base, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(logits(loaded, micro_batch()), changed)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("method", "frozen_blocks"),
    [(LastBlocks(), 3), (LastBlocks(num_blocks=3), 1), (Select(train=r".*\.2\..*ln_2\.bias"), 2), (BitFit(), 0)],
)
def test_backward_pass_ends_at_the_lowest_trained_block(
    method: Method, frozen_blocks: int, checkpointing: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Blocks below it have no gradients, and only this block and those above it are recomputed."""
    base = random_base(gpt2_config(n_layer=4))
    model = method.apply(base, tokenizer)
    method.set_training(model)
    if checkpointing:
        enable_checkpointing(base)
    outputs: list[bool] = []
    runs = [0] * 4
    for index, (_, block) in enumerate(find_blocks(base)):
        block.register_forward_hook(lambda _module, _inputs, hidden: outputs.append(hidden.requires_grad))

        def count_run(*_: object, number: int = index) -> None:
            runs[number] += 1

        block.get_submodule("ln_1").register_forward_hook(count_run)
    loss = summed_loss(model, micro_batch())
    assert outputs[-4:] == [False] * frozen_blocks + [True] * (4 - frozen_blocks)
    runs[:] = [0] * 4
    loss.backward()  # type: ignore[no-untyped-call]
    assert runs == [0] * frozen_blocks + [int(checkpointing)] * (4 - frozen_blocks)


def test_presets_select_by_structure(tokenizer: PreTrainedTokenizerBase) -> None:
    """Attention has the projections and their biases; last_blocks has no embedding, final normalization or head."""
    attention = set(apply(Attention(), random_base(gpt2_config()), tokenizer))
    assert attention == {
        f"transformer.h.{block}.attn.{part}.{kind}"
        for block, part, kind in itertools.product((0, 1), ("c_attn", "c_proj"), ("weight", "bias"))
    }
    last = set(apply(LastBlocks(), random_base(gpt2_config()), tokenizer))
    assert last == {
        name for name, _ in random_base(gpt2_config()).named_parameters() if name.startswith("transformer.h.1.")
    }
    norms = set(apply(LayerNorm(), random_base(llama_config()), tokenizer))
    assert norms == {
        "model.norm.weight",
        *(f"model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")),
    }


@pytest.mark.parametrize(
    ("case", "kind"),
    mark_slow([(case, kind) for case in CASES for kind in PRESETS], lambda point: point[0] in FAST, seed=21),
)
def test_presets_on_every_architecture(case: str, kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Each preset trains the parameters that it counts, or is refused because the architecture has none of them."""
    base, method = build_tiny_model(case), PRESETS[kind]
    has_biases = any(name.endswith("bias") and weight.requires_grad for name, weight in base.named_parameters())
    if case in REFUSED.get(kind, ()) or (kind == "bitfit" and not has_biases):
        with pytest.raises(UnsupportedModelError, match=r"(no .* to train|several or none).*; use method\.kind="):
            method.apply(base, tokenizer)
        return
    expected = method.trainable_parameters(base)
    model = method.apply(base, tokenizer).train()
    ids = torch.arange(8)[None] + 3
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    trained = trainable_parameters(model)
    assert sum(parameter.numel() for parameter in trained.values()) == expected > 0
    # Decoders of encoder-decoder models have cross-attention, which a language model does not use.
    without_gradient = {name for name, parameter in trained.items() if parameter.grad is None}
    assert all("encoder_attn" in name for name in without_gradient)
    assert len(without_gradient) < len(trained)
