"""Every method on stories260K, a trained Llama of 260 thousand parameters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from peftbench.data.collate import Collator
from peftbench.methods import METHODS
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.methods.select import Select
from peftbench.methods.select_presets import Attention, Embeddings, LastBlocks, LayerNorm
from peftbench.modeling.loading import LoadedModel, load_model
from peftbench.recipe.schema import Model
from peftbench.training.loop import train_step
from tests.helpers.batches import one_batch
from tests.helpers.training import assemble_training, trainable_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator

ATTENTION = 2 * 64 * 64 + 2 * 64 * 32
"""Parameters of a block's attention: q and o, k and v (which have half the heads)."""
BLOCK = ATTENTION + 3 * 64 * 172 + 2 * 64
"""Parameters of a block: attention, the three MLP matrices, and two normalizations."""
COUNTS_BY_HAND: list[tuple[Method, int]] = [
    (Full(), 512 * 64 + 5 * BLOCK + 64),  # embedding, blocks, and the final norm
    (LastLayer(), 512 * 64),
    # q and o, k and v (which have half the heads), and the three MLP matrices of 5 layers.
    (Lora(r=8), 5 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 172))),
    (PromptTuning(num_virtual_tokens=20), 20 * 64),
    (Select(train=r".*\.0\..*"), BLOCK),
    (LayerNorm(), 11 * 64),
    (Embeddings(), 512 * 64),
    (LastBlocks(num_blocks=2), 2 * BLOCK),
    (Attention(), 5 * ATTENTION),
]


@pytest.fixture
def stories(shared_data: Path) -> LoadedModel:
    """Return the model, loaded like in a run."""
    folder = shared_data / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("stories260K is not in the shared data")
    return load_model(Model(path=str(folder)))


def test_counts_cover_every_method() -> None:
    """Each method has exactly one row, except bitfit: the model has no biases."""
    assert METHODS
    assert [method.kind for method, _ in COUNTS_BY_HAND] == [kind for kind in METHODS if kind != "bitfit"]


@pytest.mark.parametrize(("method", "expected"), COUNTS_BY_HAND, ids=[method.kind for method, _ in COUNTS_BY_HAND])
def test_one_step_lowers_the_loss(
    method: Method, expected: int, stories: LoadedModel, accelerator: Accelerator
) -> None:
    """The trained parameters are those counted by hand, and the first loss is that of a trained model."""
    assert method.trainable_parameters(stories.model) == expected
    torch.manual_seed(0)
    model = method.apply(stories.model, stories.tokenizer)
    method.set_training(model)
    assert sum(parameter.numel() for parameter in trainable_parameters(model).values()) == expected
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = stories.tokenizer(text)["input_ids"]
    batch = one_batch(Collator(0, method.virtual_tokens).collate([ids], [[1, len(ids)]]))
    trainer = assemble_training(accelerator, model, torch.optim.SGD(trainable_parameters(model).values(), lr=0.01))
    before = train_step(accelerator, trainer, batch, max_grad_norm=1.0)
    after = train_step(accelerator, trainer, batch, max_grad_norm=1.0)
    # A uniform prediction has a loss of log 512 = 6.2; a random soft prompt increases the loss.
    assert before < (5.5 if method.virtual_tokens else 2.0)
    assert after < before
