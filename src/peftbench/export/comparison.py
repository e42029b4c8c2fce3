"""Compare the logits of a merged model with those of the adapter that it was merged from.

The measure is the relative error: the norm of the difference over the norm of the reference. Both are centered for each
position, since a constant added to all logits of a position changes no probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from peftbench.errors import MergeError, PeftbenchError
from peftbench.training.data import build_encoder, load_split

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftbench.modeling.loading import LoadedModel
    from peftbench.recipe.schema import Precision, Recipe

TOLERANCES: dict[str, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Largest relative error of the logits that the written model computes in its dtype.

A rounding error of float32, fp16 and bf16 is 6e-8, 5e-4 and 4e-3. It grows through the layers of a model.
"""
MERGE_TOLERANCE = 1e-3
"""Largest relative error of the merge in float32, before rounding."""
MERGE_SHARE = 1e-2
"""Largest error of the merge in float32, as a part of what the adapter changes. It finds a merge of the wrong weights,
also if the adapter itself changes little."""
_FLOAT32_FLOOR = 1e-5
"""Relative error that float32 has in any case, below which ``MERGE_SHARE`` is not checked."""
_NUM_EXAMPLES = 4
_MAX_TOKENS = 128
_FIXED_TEXT = (
    "The council met on Tuesday, 14 March, and approved 3 of the 12 proposals. Q: What is 17 + 25? A: 42.\n"
    "def area(radius):\n    return 3.14159 * radius ** 2\n"
)


@dataclass(frozen=True)
class LogitComparison:
    """Difference between the written model's logits and the trained model's."""

    dtype: Precision
    """Type of the written weights."""
    error: float
    """Relative error of the written model, which computes in its dtype."""
    adapter_effect: float | None
    """Relative change of the base model's logits by the adapter; None for a saved whole model."""
    num_texts: int
    """Number of texts compared."""
    missing_examples: str | None = None
    """Reason for which the run's own examples were not compared, None if they were."""

    @property
    def tolerance(self) -> float:
        """Largest relative error that is accepted."""
        return TOLERANCES[self.dtype]

    def describe(self) -> str:
        """Return the result as one sentence without a period."""
        sentence = (
            f"on {self.num_texts} texts the logits in {self.dtype} differ from the trained model's by "
            f"{self.error:.1e} (relative; tolerance {self.tolerance:.0e})"
        )
        return (
            sentence
            if self.adapter_effect is None
            else f"{sentence}; the adapter changes them by " + (f"{self.adapter_effect:.1e}")
        )

    @property
    def warning(self) -> str | None:
        """A note if rounding changes the logits more than the adapter does, else None."""
        if self.adapter_effect is None or self.error <= self.adapter_effect:
            return None
        return (
            f"rounding to {self.dtype} changes the logits more than the adapter does ({self.error:.1e} and "
            f"{self.adapter_effect:.1e}); use --dtype fp32 to keep what was trained"
        )


@dataclass(frozen=True)
class ComparisonTexts:
    """Token ids on which models are compared."""

    ids: tuple[tuple[int, ...], ...]
    missing_examples: str | None
    """Reason for which the run's own examples are missing, None if they are not."""


def encode_texts(recipe: Recipe, base: LoadedModel) -> ComparisonTexts:
    """Return a fixed text and the first examples of the evaluated split, as token ids.

    Examples that cannot be read, e.g. because the run was moved from its data, are left out.
    """
    length = min(_MAX_TOKENS, base.max_positions or _MAX_TOKENS)
    texts = [tuple(base.tokenizer(_FIXED_TEXT, verbose=False)["input_ids"][:length])]
    reason = None
    try:
        split = load_split(recipe, recipe.evaluate.split)
        rows = split.select(range(min(_NUM_EXAMPLES, len(split))))
        encoded = build_encoder(recipe, base).encode_split(rows, recipe.evaluate.split, recipe.data.overlong)[0]
        texts += [tuple(row["input_ids"][:length]) for row in islice(encoded, _NUM_EXAMPLES)]
    except PeftbenchError as error:
        reason = str(error)
    return ComparisonTexts(tuple(texts), reason)


def compute_logits(model: nn.Module, texts: ComparisonTexts) -> list[torch.Tensor]:
    """Return the model's centered logits of each text in float32, computed in the dtype of its weights."""
    import torch

    model.eval()
    results = []
    with torch.no_grad():
        for ids in texts.ids:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
            results.append(logits - logits.mean(dim=-1, keepdim=True))
    return results


def relative_error(logits: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Return the norm of the difference over the norm of ``reference``; infinite if a value is not finite."""
    import torch

    difference = sum(float((one - other).double().square().sum()) for one, other in zip(logits, reference, strict=True))
    norm = sum(float(one.double().square().sum()) for one in reference)
    error = (difference / norm) ** 0.5 if norm else float("inf")
    return error if torch.isfinite(torch.tensor(error)) else float("inf")


def check_merge(error: float, adapter_effect: float) -> None:
    """Check the merge in float32, before its weights are rounded.

    Raises:
        MergeError: the merged weights are not those of base and adapter.
    """
    if error > MERGE_TOLERANCE or (error > _FLOAT32_FLOOR and error > MERGE_SHARE * adapter_effect):
        raise MergeError(
            f"the merged model's logits differ from the adapter's by {error:.1e} in float32, and the adapter itself "
            f"changes them by {adapter_effect:.1e}",
            "use the adapter without --merge, and report this as a bug",
        )


def check_written(comparison: LogitComparison) -> None:
    """Check the logits of the written model.

    Raises:
        MergeError: they differ by more than the tolerance of its dtype.
    """
    if comparison.error <= comparison.tolerance:
        return
    raise MergeError(
        f"the logits of the model in {comparison.dtype} differ from the trained model's by {comparison.error:.1e}, "
        f"more than the tolerance {comparison.tolerance:.0e}",
        "use --dtype fp32" if comparison.dtype != "fp32" else "report this as a bug",
    )
