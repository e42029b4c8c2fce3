"""Load, encode and collate the recipe's examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from peftbench.data.collate import Collator, PaddingFreeCollator
from peftbench.data.encode import Encoder, SequenceLayout
from peftbench.distributed.collectives import main_process_first
from peftbench.errors import EmptySplitError, OutOfRangeError
from peftbench.methods.base import Target
from peftbench.modeling.loading import get_max_positions

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from peftbench.data.batches import EncodedExamples
    from peftbench.data.readers.rows import Columns
    from peftbench.modeling.loss import CausalLMLoss
    from peftbench.recipe.schema import Recipe
    from peftbench.tasks.base import Task


INTERVAL_SPLIT = "validation"
"""The split that is evaluated during training: weights selected by the test split would not be tested on it."""


@dataclass(frozen=True)
class EncodedSplit:
    """One split, subsampled and encoded."""

    dataset: Dataset
    num_dropped: int


def check_splits(recipe: Recipe, *, evaluate_only: bool = False) -> None:
    """Check the files and columns that the run will read, before anything waits for the network.

    Raises:
        DataError: a file, a column or a first example is not usable, or the split of ``evaluate.interval`` is missing.
    """
    method = recipe.method
    _check_baseline(recipe)
    reads_training = method.is_trainable or method.reads_training_split or method.num_shots
    needs_training = reads_training and not evaluate_only
    for split in dict.fromkeys([recipe.evaluate.split, *(["train"] if needs_training else [])]):
        recipe.data.source.check(split, select_columns(recipe))
    if needs_training and recipe.evaluate.interval is not None:
        with explain_interval_split():
            recipe.data.source.check(INTERVAL_SPLIT, select_columns(recipe))


def _check_baseline(recipe: Recipe) -> None:
    """Check that a baseline without a model has something to predict.

    Raises:
        OutOfRangeError: it has not.
    """
    method, evaluation = recipe.method, recipe.task.evaluation
    if not method.needs_model and (evaluation == "loss" or (evaluation == "choices" and not method.predicts_choices)):
        raise OutOfRangeError(
            f"method.kind={method.kind} does not support task.kind={recipe.task.kind}",
            "leave it out of the comparison, or use zero_shot",
        )


def select_columns(recipe: Recipe) -> Columns:
    """Return the columns that the recipe's task reads from its source."""
    return recipe.task.select_columns(recipe.data.source.id_column)


@contextmanager
def explain_interval_split() -> Iterator[None]:
    """Add why a validation split is needed to the error that there is none.

    Raises:
        EmptySplitError: the code in the context raised it.
    """
    try:
        yield
    except EmptySplitError as error:
        raise EmptySplitError(
            f"evaluate.interval evaluates the validation split, since the test split must not select weights: {error}",
            "or set evaluate.interval=null",
        ) from error


def fingerprint_training_data(recipe: Recipe) -> str:
    """Return the identity of the data that determine the saved weights: the training split, and what selects them."""
    source = recipe.data.source
    if not recipe.selects_by_held_out_loss:
        return source.fingerprint("train")
    return f"{source.fingerprint('train')}+{source.fingerprint(INTERVAL_SPLIT)}"


def load_split(recipe: Recipe, split: str) -> Dataset:
    """Return the recipe's seeded subsample of a split, not yet encoded.

    Raises:
        EmptySplitError: the split has fewer examples than the recipe requests.
    """
    dataset = recipe.data.source.load(split, select_columns(recipe))
    size: int | None = getattr(recipe.data, split)
    if size is None:
        return dataset
    if size > len(dataset):
        raise EmptySplitError(
            f"data.{split}={size} is more than the {len(dataset)} examples of the {split} split; "
            f"set it to {len(dataset)} or less, or to null for all"
        )
    return dataset.shuffle(seed=recipe.data.seed).select(range(size))


def load_encoded_split(recipe: Recipe, encoder: Encoder, split: str, accelerator: Accelerator) -> EncodedSplit:
    """Return the encoded subsample of a split; the main process encodes it, the others read its cache."""

    def encode() -> EncodedSplit:
        config = recipe.evaluate
        is_evaluated = split == config.split or (split == INTERVAL_SPLIT and config.interval_metrics)
        dataset = load_split(recipe, split)
        if is_evaluated and recipe.method.num_shots:
            dataset = add_shots(dataset, load_split(recipe, "train"), recipe)
        return EncodedSplit(*encoder.encode_split(dataset, split, recipe.data.overlong, is_evaluated=is_evaluated))

    return main_process_first(accelerator, encode)


def add_shots(dataset: Dataset, training_examples: Dataset, recipe: Recipe) -> Dataset:
    """Return the examples with the same ``method.shots`` training examples before each prompt.

    Raises:
        EmptySplitError: the training split has fewer examples.
        OutOfRangeError: the task cannot put examples before a prompt.
    """
    num_shots, task = recipe.method.num_shots, recipe.task
    if num_shots > len(training_examples):
        raise EmptySplitError(
            f"method.shots={num_shots} is more than the {len(training_examples)} examples of the train split; lower it"
        )
    chosen = training_examples.shuffle(seed=recipe.data.seed).select(range(num_shots))
    shots = [dict(row) for row in chosen]
    key = f"{dataset._fingerprint} {chosen._fingerprint} {task.model_dump_json()}"
    return dataset.map(
        lambda row: task.add_shots(row, shots),
        new_fingerprint=hashlib.blake2b(key.encode(), digest_size=16).hexdigest(),
        desc=f"adding {num_shots} examples",
    )


def read_targets(dataset: Dataset, task: Task) -> list[Target]:
    """Return the expected text of each example, with the index of the right choice if the task has choices."""
    has_choices = task.evaluation == "choices"
    return [Target(task.get_reference(row), task.get_choices(row)[1] if has_choices else None) for row in dataset]


class Tokenized(Protocol):
    """A tokenizer with the model's number of positions."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""

    @property
    def max_positions(self) -> int | None:
        """Number of positions of the model, None if its config has no limit."""


def build_encoder(recipe: Recipe, base: Tokenized) -> Encoder:
    """Return the encoder for this base model and this method's virtual tokens."""
    layout = build_layout(recipe, base.max_positions)
    return Encoder(base.tokenizer, layout, recipe.task)


def build_layout(recipe: Recipe, max_positions: int | None) -> SequenceLayout:
    """Return the length limit of sequences for a model with ``max_positions``.

    Raises:
        OutOfRangeError, SequenceTooShortError: as in :meth:`SequenceLayout.for_model`.
    """
    return SequenceLayout.for_model(
        max_length=recipe.data.max_length,
        max_new_tokens=recipe.evaluate.max_new_tokens if recipe.task.evaluation == "generate" else 0,
        max_positions=max_positions,
        virtual_tokens=recipe.method.occupied_positions,
    )


def build_collator(recipe: Recipe, loss: CausalLMLoss, pad_token_id: int) -> Collator:
    """Return the collator that builds micro-batches of the recipe's examples.

    Raises:
        OutOfRangeError: the recipe packs sequences and the model needs masks, or it pads to a multiple of more
            positions than the model has.
    """
    padding, virtual = recipe.data.padding, recipe.method.virtual_tokens
    multiple, max_positions = recipe.data.pad_to_multiple_of, get_max_positions(loss.base.config)
    if max_positions is not None and multiple > max_positions:
        raise OutOfRangeError(
            f"data.pad_to_multiple_of={multiple} is more than the {max_positions} positions of the model; "
            f"set {max_positions} or less"
        )
    if padding == "free" and loss.uses_masks:
        raise OutOfRangeError(
            f"data.padding=free packs sequences into one row, and this model cannot keep their attention separate: "
            f"{loss.mask_reason}; set data.padding=longest"
        )
    if padding == "free" or (padding == "auto" and not loss.uses_masks):
        return PaddingFreeCollator(pad_token_id, virtual, pad_to_multiple_of=multiple)
    pad_to = recipe.data.max_length if padding == "max_length" else None
    return Collator(
        pad_token_id,
        virtual,
        pad_to,
        label_padding=recipe.data.label_padding,
        pad_to_multiple_of=multiple,
        max_positions=max_positions,
    )


def as_numpy(examples: EncodedExamples) -> EncodedExamples:
    """Return encoded examples as arrays; converting lists of numbers to tensors takes several times as long."""
    with_format = getattr(examples, "with_format", None)  # only a Dataset has it
    return examples if with_format is None else with_format("numpy")  # type: ignore[no-any-return]
