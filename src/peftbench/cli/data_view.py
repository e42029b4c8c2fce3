"""Views of encoded examples for a terminal: tokens with their labels, and a histogram of lengths."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from difflib import SequenceMatcher
from operator import itemgetter
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.text import Text

from peftbench.data.encode import iter_spans

if TYPE_CHECKING:
    from peftbench.data.encode import Encoder
    from peftbench.training.data_summary import DataSummary, EncodedExample

_Use = Literal["context", "labeled", "cut"]
_STYLES: dict[_Use, str] = {"context": "", "labeled": "green underline", "cut": "red strike"}
_BRACKETS: dict[_Use, str] = {"context": "{}", "labeled": "⟦{}⟧", "cut": "⟨{}⟩"}
"""Marks where the output has no colors."""
_NUM_BARS = 12
_BAR_WIDTH = 40


def print_examples(summary: DataSummary, encoder: Encoder, *, ids: bool) -> None:
    """Print the first examples token by token. Without colors, labels are in ``⟦ ⟧`` and cut tokens in ``⟨ ⟩``."""
    console = Console(highlight=False)
    for example in summary.shown:
        labels = sum(end - start for start, end in iter_spans(example.label_spans))
        cut = len(example.whole_ids) - len(example.input_ids)
        head = f"example {example.id} of {summary.split}: {len(example.input_ids)} tokens, {labels} labeled"
        console.print(Text(head + (f", {cut} cut" if cut else ""), style="bold"), soft_wrap=True)
        text = Text()
        for use, tokens in itertools.groupby(_iter_uses(example), key=itemgetter(0)):
            content = _decode([id for _, id in tokens], encoder, ids=ids)
            text.append(content if console.color_system else _BRACKETS[use].format(content), style=_STYLES[use])
        console.print(text, soft_wrap=True)
        console.print()


def _iter_uses(example: EncodedExample) -> Iterator[tuple[_Use, int]]:
    """Yield each token of an example with its use; cut tokens are at their original positions."""
    cuts = _find_cuts(example.whole_ids, example.input_ids)
    labeled = {position for span in iter_spans(example.label_spans) for position in range(*span)}
    for position, id in enumerate(example.input_ids):
        yield from (("cut", removed) for removed in cuts.get(position, ()))
        yield "labeled" if position in labeled else "context", id
    yield from (("cut", removed) for removed in cuts.get(len(example.input_ids), ()))


def _find_cuts(whole: list[int], kept: list[int]) -> dict[int, list[int]]:
    """Return the tokens that are in ``whole`` only, by the position in ``kept`` before which they stood."""
    start = next((index for index, pair in enumerate(zip(whole, kept, strict=False)) if pair[0] != pair[1]), len(kept))
    changes = SequenceMatcher(None, whole[start:], kept[start:], autojunk=False).get_opcodes()
    return {start + at: whole[start + first : start + last] for kind, first, last, at, _ in changes if kind != "equal"}


def _decode(token_ids: list[int], encoder: Encoder, *, ids: bool) -> str:
    if ids:
        return "".join(f"{encoder.tokenizer.decode([id])!r}:{id} " for id in token_ids)
    return str(encoder.tokenizer.decode(token_ids))


def print_lengths(summary: DataSummary, *, overlong: str) -> None:
    """Print a histogram of lengths, and how many examples are cut or do not fit."""
    lengths, limit = sorted(summary.lengths), summary.max_length
    print(
        f"{len(lengths):,} examples of {summary.split}, lengths in tokens before cutting (data.max_length {limit:,}):"
    )
    width = max(1, -(-(lengths[-1] + 1) // _NUM_BARS))
    counts = [sum(start <= length < start + width for length in lengths) for start in range(0, lengths[-1] + 1, width)]
    for index, count in enumerate(counts):
        start = index * width
        bar = "█" * round(_BAR_WIDTH * count / max(counts)) or ("▏" if count else "")
        mark = "  <- data.max_length" if start <= limit < start + width else ""
        print(f"  {start:>7,} to {start + width - 1:>7,}  {count:>8,}  {bar}{mark}")
    median, largest = lengths[len(lengths) // 2], lengths[-1]
    labels = sorted(summary.num_labels)
    print(f"median {median:,}, longest {largest:,}; labeled tokens: {_describe_labels(labels)}")
    action = "dropped" if overlong == "drop" else "refused (set data.overlong=drop to drop them)"
    print(f"{summary.num_cut:,} are cut to fit ({summary.num_cut_labels:,} labeled tokens lost)")
    print(f"{summary.num_dropped:,} do not fit even when cut and are {action}")
    if summary.num_with_control_tokens:
        print(f"{summary.num_with_control_tokens:,} have text that this tokenizer turns into control tokens")


def _describe_labels(labels: list[int]) -> str:
    return f"median {labels[len(labels) // 2]:,}, most {labels[-1]:,}" if labels else "none"
