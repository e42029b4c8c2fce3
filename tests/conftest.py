"""What all tests share: an own cache, small bases with random weights, a small corpus, and recipes over them.

Nothing here needs the network or a file outside the repository. Tests of larger shared data take the ``shared_data``
fixture, which skips them where that data is absent.
"""

from __future__ import annotations

import os
import tempfile

# Before any library of the hub is imported, since each reads its environment once: a cache of this run's own, so that
# no test passes by what an earlier run left behind, and no hub, so that none passes by the network.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="peftbench-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"

import copy
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from peftbench import shipped
from peftbench.data.sources import Files
from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.recipe.schema import Data, Evaluate, Model, Profile, Recipe, Train
from tests.bases import ARCHITECTURES, FAMILIES, random_base

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftbench.data.batches import GlobalBatch
    from peftbench.data.collate import MicroBatch
    from peftbench.distributed.accelerator import AcceleratorContext
    from peftbench.modeling.loss import CausalLMLoss
    from peftbench.record import RunRecord
    from peftbench.training.build import AdaptedModel, TrainingComponents

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_unconfigure() -> None:
    """Leave no cache behind."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def one_process_is_one_run() -> Iterator[None]:
    """Accelerate keeps its state for the process, and a process is one run; here it is one test."""
    with patch.dict(os.environ):  # engines write their rank into it
        forget_accelerators()
        yield
        forget_accelerators()


def forget_accelerators() -> None:
    """Let the next accelerator be another one."""
    if "accelerate" in sys.modules:  # a test that never used it need not import it either
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is bound in this test is bound to the CPU, on a machine with a GPU too."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def accelerator() -> Accelerator:
    """One process on CPU in float32."""
    from accelerate import Accelerator

    return Accelerator(cpu=True, mixed_precision="no")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public data too large for the repository, kept beside it."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data is not beside this checkout (../shared/data)")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The shipped base's tokenizer, of which tests use only that its ids are below its vocabulary's size."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shipped.SHIPPED_MODEL_DIR)  # type: ignore[no-any-return]


# --- small bases -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def fresh_base() -> Callable[[str], PreTrainedModel]:
    """Given the name of an architecture, a new copy of its base, always with the same weights."""
    made: dict[str, PreTrainedModel] = {}

    def copied(architecture: str) -> PreTrainedModel:
        if architecture not in made:
            made[architecture] = random_base(FAMILIES[architecture]())
        return copy.deepcopy(made[architecture])

    return copied


@pytest.fixture(scope="session")
def base_folder(
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """Given the name of an architecture, a folder with its base and tokenizer, for a recipe's ``model.path``."""
    made: dict[str, Path] = {}

    def saved(architecture: str) -> Path:
        if architecture not in made:
            folder = made[architecture] = tmp_path_factory.mktemp(architecture)
            fresh_base(architecture).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return made[architecture]

    return saved


# --- methods ---------------------------------------------------------------------------------------------------------

ONE_OF_EACH: dict[str, Method] = {
    "full": Full(),
    "last_layer": LastLayer(),
    "lora": Lora(r=4),
    "prompt_tuning": PromptTuning(num_virtual_tokens=5),
}
"""Every method once, as plain as can be; the conformance battery proves that none is missing."""

every_method = pytest.mark.parametrize("method", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
"""Runs a test for every method, for what does not depend on a method's variants."""

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
"""Runs a test for every small architecture."""


# --- batches ---------------------------------------------------------------------------------------------------------

Lengths = Sequence[tuple[int, int]]
LENGTHS_AND_PROMPTS = ((9, 6), (14, 5), (20, 19), (26, 12))
"""Tokens of each row of ``micro_batch``, and how many of them are prompt: labelled tokens are 3, 9, 1 and 14."""


def rows(lengths_and_prompts: Lengths, seed: int = 5) -> list[dict[str, Any]]:
    """Encoded examples of these lengths with random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(1, 4096, (length,), generator=generator).tolist(), "prompt_tokens": prompt}
        for length, prompt in lengths_and_prompts
    ]


def micro_batch(lengths_and_prompts: Lengths = LENGTHS_AND_PROMPTS, seed: int = 5, virtual: int = 0) -> MicroBatch:
    """Random tokens in rows of unequal length, padded at the right."""
    from peftbench.data.collate import Collator

    made = rows(lengths_and_prompts, seed)
    return Collator(0, virtual).collate([row["input_ids"] for row in made], [row["prompt_tokens"] for row in made])


def packed(
    lengths_and_prompts: Lengths = LENGTHS_AND_PROMPTS, seed: int = 5, virtual: int = 0, multiple: int = 1
) -> MicroBatch:
    """The same examples one after another in a single row."""
    from peftbench.data.collate import PaddingFreeCollator

    made, packer = rows(lengths_and_prompts, seed), PaddingFreeCollator(0, virtual, pad_to_multiple_of=multiple)
    return packer.collate([row["input_ids"] for row in made], [row["prompt_tokens"] for row in made])


def labelled(batch: MicroBatch) -> int:
    """Tokens of ``batch`` that enter the loss."""
    return len(batch.targets)


def mask_of(batch: MicroBatch) -> torch.Tensor:
    """Which positions of padded rows are real, as transformers is told: (rows, width)."""
    return (torch.arange(batch.input_ids.shape[1]) < torch.tensor(batch.lengths)[:, None]).long()


def logits(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Logits over all real positions and padding, as transformers computes them: (rows, width, vocabulary)."""
    output: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=mask_of(batch), use_cache=False).logits
    return output[:, -batch.input_ids.shape[1] :]


def labels_of(batch: MicroBatch, virtual_tokens: int = 0) -> torch.Tensor:
    """The labels of padded rows as transformers takes them, -100 where there is none: (rows, width)."""
    rows_of_labels = torch.full((batch.input_ids.shape[0], batch.input_ids.shape[1] + virtual_tokens), -100)
    rows_of_labels.view(-1)[batch.logit_indices + 1] = batch.targets
    return rows_of_labels[:, virtual_tokens:]


def shown(batch: MicroBatch, virtual_tokens: int) -> list[tuple[list[int], list[int]]]:
    """Tokens of each example and their labels, -100 where there is none, in padded rows or in documents of one."""
    if batch.packed_sequences is None:
        ids, labels = list(batch.input_ids), list(labels_of(batch, virtual_tokens))
    else:
        flat = torch.full((batch.input_ids.shape[1],), -100)
        flat[batch.logit_indices + 1] = batch.targets
        real = torch.ones_like(flat, dtype=torch.bool).index_fill(
            0, batch.packed_sequences.virtual_token_indices, False
        )
        real[sum(batch.packed_sequences.lengths[: len(batch.lengths)]) :] = False
        ids, labels = (list(values[real].split(batch.lengths)) for values in (batch.input_ids[0], flat))
    return [
        (row[:length].tolist(), labelled_[:length].tolist())
        for row, labelled_, length in zip(ids, labels, batch.lengths, strict=True)
    ]


def base_of(model: nn.Module) -> PreTrainedModel:
    """What a method was applied to."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value,operator]


def loss_for(model: nn.Module, **knobs: Any) -> CausalLMLoss:
    """How a run computes the loss of that model."""
    from peftbench.modeling.loss import build_loss

    return build_loss(base_of(model), **knobs)[0]


def summed_loss(model: nn.Module, batch: MicroBatch, **knobs: Any) -> torch.Tensor:
    """The loss of a micro-batch as a run computes it."""
    loss = loss_for(model, **knobs)
    with loss.attention_context():
        return loss(model, batch)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient; a tied one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def built_around(model: nn.Module) -> AdaptedModel:
    """As much of what a run builds as an evaluation needs."""
    from peftbench.record import ParameterCounts
    from peftbench.training.build import AdaptedModel

    base: Any = None
    return AdaptedModel(base, ParameterCounts(total=0, trainable=0), model, (), False, 0, loss_for(model))


def trainer_of(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingComponents:
    """What the loop drives, around a model and an optimizer at a constant rate, with batches of ``rows``."""
    from datasets import Dataset
    from transformers import get_scheduler

    from peftbench.data.batches import Batches
    from peftbench.data.collate import Collator
    from peftbench.training.build import TrainingComponents

    batches = Batches(Dataset.from_list(rows(LENGTHS_AND_PROMPTS)), Collator(pad_token_id=0), 4, None, seed=0)
    schedule = get_scheduler("constant", optimizer)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    return TrainingComponents(prepared, loss_for(model), wrapped, schedule, batches, total_steps=1)


def one_batch(*parts: MicroBatch) -> GlobalBatch:
    """The global batch of these micro-batches, on the only process."""
    from peftbench.data.batches import GlobalBatch
    from peftbench.data.collate import Collator, TokenCounts

    counts = TokenCounts()
    for part in parts:
        counts += Collator(pad_token_id=0).count_tokens(part)
    return GlobalBatch(parts, counts)


# --- corpus and recipes ----------------------------------------------------------------------------------------------

_TEXT = """harbour council vote bridge river storm school engine market doctor garden winter signal budget minister
train village forest museum player record season island camera student teacher morning evening letter answer"""
_WORDS = _TEXT.split()


def examples(count: int, seed: int) -> list[dict[str, str]]:
    """Articles of 4 to 30 words with summaries of 1 to 5."""
    generator = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> str:
        size = int(torch.randint(low, high + 1, (), generator=generator))
        return " ".join(_WORDS[int(i)] for i in torch.randint(len(_WORDS), (size,), generator=generator))

    return [{"id": f"{seed}-{i}", "article": text(4, 30), "summary": text(1, 5)} for i in range(count)]


def write_corpus(folder: Path, splits: dict[str, list[dict[str, str]]]) -> Files:
    """``splits`` as files, and the source that reads them."""
    for split, written in splits.items():
        lines = [json.dumps(example) + "\n" for example in written]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    places = {split: str(folder / f"{split}.jsonl") for split in splits}
    return Files(id="id", **places)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A few dozen examples in three splits."""
    splits = {"train": examples(24, seed=1), "validation": examples(8, seed=2), "test": examples(8, seed=3)}
    return write_corpus(tmp_path_factory.mktemp("corpus"), splits)


def alone(accelerator: Accelerator) -> AcceleratorContext:
    """One process without an engine, in the accelerator's precision."""
    from peftbench.distributed.accelerator import AcceleratorContext
    from peftbench.distributed.engines import SINGLE

    precision = str(accelerator.mixed_precision)
    return AcceleratorContext(accelerator, SINGLE, "fp32" if precision == "no" else precision)  # type: ignore[arg-type]


def built_from(recipe: Recipe, accelerator: Accelerator) -> AdaptedModel:
    """What a run builds, from the base that it loads."""
    from peftbench.training.build import apply_method, load_base_model

    return apply_method(recipe, load_base_model(recipe), alone(accelerator))


def trainer_from(recipe: Recipe, accelerator: Accelerator, built: AdaptedModel | None = None) -> TrainingComponents:
    """What a run's loop drives, over the recipe's examples."""
    from peftbench.training.build import build_encoder, build_training, load_encoded_split

    built = built or built_from(recipe, accelerator)
    encoder = build_encoder(recipe, built.base)
    examples = load_encoded_split(recipe, encoder, "train", accelerator).dataset
    return build_training(recipe, built, examples, encoder.eos_token_id, alone(accelerator))


@dataclass(frozen=True)
class Workshop:
    """Makes recipes over the small bases and the small corpus, and runs them."""

    base_folder: Callable[[str], Path]
    source: Files
    output: Path

    def recipe(
        self,
        method: Method,
        *,
        architecture: str = "gpt2_tied",
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        evaluate: dict[str, Any] | None = None,
        **parts: Any,
    ) -> Recipe:
        """A short run of ``method``; what is given replaces single knobs, or whole parts by name."""
        knobs_of_model = {"path": str(self.base_folder(architecture))} | (model or {})
        knobs_of_data = {"source": self.source, "max_tokens": 48, "separator": " TL;DR:"} | (data or {})
        knobs_of_train = {"steps": 3, "global_batch_size": 6} | (train or {})
        knobs_of_evaluate = {"generate": False, "max_new_tokens": 8, "bootstrap_resamples": 100} | (evaluate or {})
        values: dict[str, Any] = {
            "name": "run",
            "output_dir": str(self.output),
            "save_model": False,
            "method": method,
            "model": Model(**knobs_of_model),
            "data": Data(**knobs_of_data),
            "train": Train(**knobs_of_train),
            "evaluate": Evaluate(**knobs_of_evaluate),
            "profile": Profile(untimed_steps=0),
        }
        return Recipe(**values | parts)

    def run(self, recipe: Recipe) -> RunRecord:
        """The record of a run of ``recipe``, as in a process of its own."""
        from peftbench.run.runner import Run

        forget_accelerators()
        record, _ = Run(recipe).execute()
        return record


@pytest.fixture
def workshop(base_folder: Callable[[str], Path], corpus: Files, tmp_path: Path, on_cpu: None) -> Workshop:
    """Recipes over small bases, run on CPU."""
    return Workshop(base_folder, corpus, tmp_path)
