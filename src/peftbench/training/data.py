"""Load, encode and collate the recipe's examples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftbench.data.collate import Collator, PaddingFreeCollator
from peftbench.data.encode import Encoder, SequenceLayout
from peftbench.distributed.collectives import main_process_first
from peftbench.errors import EmptySplitError, OutOfRangeError
from peftbench.modeling.loading import get_max_positions

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from peftbench.data.batches import EncodedExamples
    from peftbench.modeling.loading import LoadedModel
    from peftbench.modeling.loss import CausalLMLoss
    from peftbench.recipe.schema import Recipe


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
    needs_training = recipe.method.is_trainable and not evaluate_only
    for split in dict.fromkeys([recipe.evaluate.split, *(["train"] if needs_training else [])]):
        recipe.data.source.check(split)
    if needs_training and recipe.evaluate.interval is not None:
        with explain_interval_split():
            recipe.data.source.check(INTERVAL_SPLIT)


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
    dataset = recipe.data.source.load(split)
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
        return EncodedSplit(*encoder.encode_split(load_split(recipe, split), split, recipe.data.overlong))

    return main_process_first(accelerator, encode)


def build_encoder(recipe: Recipe, base: LoadedModel) -> Encoder:
    """Return the encoder for this base model and this method's virtual tokens."""
    layout = SequenceLayout.for_model(
        separator=recipe.data.separator,
        max_length=recipe.data.max_length,
        max_new_tokens=recipe.evaluate.max_new_tokens,
        max_positions=base.max_positions,
        virtual_tokens=recipe.method.virtual_tokens,
    )
    return Encoder(base.tokenizer, layout)


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
