"""What a method saves can be loaded by its ecosystem, and is the same model."""

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
from tests.helpers.training import trainer_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

WITHOUT_CODE = {".safetensors", ".json", ".md"}
"""Endings of files that can run nothing when they are read."""


@every_case
def test_saved_and_loaded_is_the_same_model(
    case: Case,
    make_bench: MakeBench,
    accelerator: Accelerator,
    fresh_base: Callable[[str], PreTrainedModel],
    tmp_path: Path,
) -> None:
    """Trained, saved and loaded the way its ecosystem does, a model gives the same logits to the last bit."""
    bench = make_bench(case)
    untrained = bench.logits(micro_batch())
    case.method.set_training(bench.model)
    trainer = trainer_of(accelerator, bench.model, bench.optimizer)
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
def test_saves_weights_as_safetensors_alone(case: Case, make_bench: MakeBench, tmp_path: Path) -> None:
    """Weights are saved as safetensors, and nothing is that could run code when it is read."""
    case.method.save(make_bench(case).model, tmp_path)
    endings = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert ".safetensors" in endings
    assert endings <= WITHOUT_CODE


@every_case
def test_saves_what_was_trained_and_no_more(case: Case, make_bench: MakeBench, tmp_path: Path) -> None:
    """What is saved holds what was trained: an adapter alone, or a whole model where the base itself was trained."""
    from safetensors.torch import load_file

    bench = make_bench(case)
    case.method.save(bench.model, tmp_path)
    scalars = 0
    for path in tmp_path.glob("*.safetensors"):
        scalars += sum(tensor.numel() for tensor in load_file(path).values())
    if isinstance(bench.model, PeftModel):
        assert scalars == case.method.trainable_parameters(meta_base(ARCHITECTURES[case.architecture]()))
    else:
        assert scalars == sum(parameter.numel() for parameter in bench.model.parameters())
