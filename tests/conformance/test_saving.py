"""A saved model can be loaded with peft or transformers, and has the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from peftbench.training.loop import train_step
from tests.conformance.battery import Case, MakeBench, every_case
from tests.helpers.batches import logits, micro_batch, one_batch
from tests.helpers.models import ARCHITECTURES, meta_base
from tests.helpers.training import assemble_training

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

SAFE_SUFFIXES = {".safetensors", ".json", ".md"}
"""Suffixes of files that execute no code when they are loaded."""


@every_case
def test_loaded_model_has_identical_logits(
    case: Case,
    make_bench: MakeBench,
    accelerator: Accelerator,
    fresh_base: Callable[[str], PreTrainedModel],
    tmp_path: Path,
) -> None:
    """A trained adapter is loaded with peft, a trained model with transformers."""
    bench = make_bench(case)
    untrained = bench.logits(micro_batch())
    case.method.set_training(bench.model)
    trainer = assemble_training(accelerator, bench.model, bench.optimizer)
    for _ in range(2):
        train_step(accelerator, trainer, one_batch(micro_batch(virtual=case.method.virtual_tokens)), max_grad_norm=1.0)
    expected = bench.logits(micro_batch())
    assert not torch.equal(expected, untrained)

    case.method.save(bench.model, tmp_path)
    loaded: nn.Module
    if isinstance(bench.model, PeftModel):
        loaded = PeftModel.from_pretrained(fresh_base(case.architecture), tmp_path)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.eval()
    with torch.no_grad():
        assert torch.equal(logits(loaded, micro_batch()), expected)


@every_case
def test_weights_are_saved_only_as_safetensors(case: Case, make_bench: MakeBench, tmp_path: Path) -> None:
    """No saved file can execute code when it is loaded."""
    case.method.save(make_bench(case).model, tmp_path)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert ".safetensors" in suffixes
    assert suffixes <= SAFE_SUFFIXES


@every_case
def test_adapter_or_whole_model_is_saved(case: Case, make_bench: MakeBench, tmp_path: Path) -> None:
    """The number of saved values is that of the adapter, or of the whole model if base weights were trained."""
    from safetensors.torch import load_file

    bench = make_bench(case)
    case.method.save(bench.model, tmp_path)
    num_values = 0
    for path in tmp_path.glob("*.safetensors"):
        num_values += sum(tensor.numel() for tensor in load_file(path).values())
    if isinstance(bench.model, PeftModel):
        assert num_values == case.method.trainable_parameters(meta_base(ARCHITECTURES[case.architecture]()))
    else:
        assert num_values == sum(parameter.numel() for parameter in bench.model.parameters())
