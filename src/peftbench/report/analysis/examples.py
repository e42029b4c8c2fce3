"""Sentences on the examples of a run: shared by splits, cut, dropped."""

from __future__ import annotations

from collections.abc import Iterator

from peftbench.record import RunRecord


def describe_overlap(record: RunRecord) -> Iterator[str]:
    """Yield a sentence for evaluated examples that the model was trained on."""
    overlap, quality = record.split_overlap, record.quality
    if overlap is None:
        return
    split = record.recipe.get("evaluate", {}).get("split", "test")
    total = quality.num_examples if quality is not None else record.num_examples.get(split, 0)
    if overlap.same_file:
        yield f"{split} and train are the same file, so the model is evaluated on its training examples"
    elif overlap.texts:
        yield (
            f"{overlap.texts:,} of the {total:,} {split} texts are training texts too "
            f"({overlap.texts_with_reference:,} with the same reference), so quality is partly that on training data"
        )
    elif overlap.ids:
        yield f"{overlap.ids:,} of the {total:,} {split} ids are also training ids, but their texts differ"


def describe_changed_examples(record: RunRecord) -> Iterator[str]:
    """Yield a sentence for each split with examples that are not used as given."""
    length = record.recipe.get("data", {}).get("max_length")
    limit = f"data.max_length={length}" if length is not None else "the model's positions"
    for split, used in record.num_examples.items():
        if dropped := record.num_dropped_examples.get(split):
            yield f"{dropped:,} of {used + dropped:,} {split} examples are dropped: they do not fit {limit}"
        if cut := record.num_cut_examples.get(split):
            labels = record.num_cut_labels.get(split)
            lost = f" ({labels:,} labeled tokens are lost)" if labels else ""
            yield f"{cut:,} of {used:,} {split} texts are cut to fit {limit}{lost}"
        if control := record.num_control_token_examples.get(split):
            yield f"{control:,} of {used:,} {split} texts contain a control token's name, encoded as that token"
