"""Last-layer tuning: the parameters that each value of ``head`` trains, and the saved model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM

from peftbench.methods.last_layer import LastLayer
from peftbench.training.loop import train_step
from tests.helpers.batches import logits, micro_batch, one_batch
from tests.helpers.methods import every_architecture
from tests.helpers.models import embeddings_of, gpt2_config, head_of, random_base
from tests.helpers.training import assemble_training, summed_loss, trainable_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def _train(accelerator: Accelerator, model: PreTrainedModel, steps: int = 3) -> None:
    trainer = assemble_training(accelerator, model, torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2))
    for _ in range(steps):
        train_step(accelerator, trainer, one_batch(micro_batch()), max_grad_norm=None)


@every_architecture
def test_untied_trains_and_saves_a_separate_head(
    architecture: str,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    tmp_path: Path,
) -> None:
    """The embedding is unchanged, and the loaded model has the same separate head."""
    original = embeddings_of(fresh_base(architecture))
    method = LastLayer()
    model = method.apply(fresh_base(architecture), tokenizer)
    method.set_training(model)
    assert torch.equal(head_of(model), head_of(fresh_base(architecture)))
    _train(accelerator, model)
    head = head_of(model)
    assert torch.equal(embeddings_of(model), original)
    assert not torch.equal(head, head_of(fresh_base(architecture)))

    method.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(head_of(loaded), head)
    assert torch.equal(embeddings_of(loaded), original)


@every_architecture
def test_untied_initial_logits_equal_those_of_the_base(
    architecture: str, fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Before the first step, logits are bit-identical."""
    batch = micro_batch()
    base = fresh_base(architecture).eval()
    method = LastLayer()
    untied = method.apply(fresh_base(architecture), tokenizer)
    method.set_training(untied)
    with torch.no_grad():
        assert torch.equal(logits(untied, batch), logits(base, batch))


def test_untied_backbone_is_in_evaluation_mode(tokenizer: PreTrainedTokenizerBase) -> None:
    """A frozen backbone has no dropout in training; a backbone that receives gradients has."""
    losses = {}
    for head in ("untied", "tied"):
        method = LastLayer(head=head)
        model = method.apply(random_base(gpt2_config(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)), tokenizer)
        model.train()
        method.set_training(model)
        assert {module.training for module in model.modules()} == {head != "untied"}
        losses[head] = [summed_loss(model, micro_batch()).item() for _ in range(2)]
    assert losses["untied"][0] == losses["untied"][1]
    assert losses["tied"][0] != losses["tied"][1]


@every_architecture
def test_untied_saves_no_activation_below_the_head(
    architecture: str, fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """No module of the backbone returns a tensor with a grad_fn, and only the head's weight has a gradient."""
    method = LastLayer()
    model = method.apply(fresh_base(architecture), tokenizer)
    method.set_training(model)
    modules_with_graph: list[str] = []

    def build_hook(name: str) -> Callable[[torch.nn.Module, object, object], None]:
        def hook(module: torch.nn.Module, inputs: object, output: object) -> None:
            tensors = output if isinstance(output, (tuple, list)) else (output,)
            if any(isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None for tensor in tensors):
                modules_with_graph.append(name)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(build_hook(name))
    loss = summed_loss(model, micro_batch())
    assert modules_with_graph == ["lm_head"]
    loss.backward()  # type: ignore[no-untyped-call]
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["lm_head.weight"]


@pytest.mark.parametrize("architecture", ["gpt2_tied", "llama_tied"])
def test_tied_trains_the_shared_matrix_and_stays_tied(
    architecture: str,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    tmp_path: Path,
) -> None:
    """Embedding and head are one trained matrix, also after saving and loading."""
    method = LastLayer(head="tied")
    model = method.apply(fresh_base(architecture), tokenizer)
    method.set_training(model)
    assert len(trainable_parameters(model)) == 1
    _train(accelerator, model)
    assert head_of(model) is embeddings_of(model)
    method.save(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert head_of(loaded) is embeddings_of(loaded)
    assert torch.equal(head_of(loaded), head_of(model))


def test_outside_blocks_trains_embedding_positions_and_final_norm(
    fresh_base: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The published study called these parameters its last layer."""
    model = LastLayer(head="outside_blocks").apply(fresh_base("gpt2_tied"), tokenizer)
    assert set(trainable_parameters(model)) == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    }


def test_model_without_a_head_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    """The error states that the model has no output head."""
    from transformers import GPT2Config, GPT2Model

    from peftbench.errors import UnsupportedModelError

    with pytest.raises(UnsupportedModelError, match="no output head"):
        LastLayer().apply(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)), tokenizer)
