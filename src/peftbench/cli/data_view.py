"""Views of encoded examples for a terminal: tokens with their labels, and a histogram of lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from peftbench.data.encode import iter_spans

if TYPE_CHECKING:
    from peftbench.data.encode import Encoder
    from peftbench.training.data_summary import DataSummary, EncodedExample

_LABEL_STYLE, _CONTEXT_STYLE, _CUT_STYLE = "green underline", "", "red"
_NUM_BARS = 12
_BAR_WIDTH = 40


def print_examples(summary: DataSummary, encoder: Encoder, *, ids: bool) -> None:
    """Print the first examples token by token. Without colors, labels are in brackets: ``⟦``, ``⟧``."""
    console = Console(highlight=False)
    for example in summary.shown:
        labels = sum(end - start for start, end in iter_spans(example.label_spans))
        head = f"example {example.id} of {summary.split}: {len(example.input_ids)} tokens, {labels} labeled"
        console.print(Text(head + (f", {example.cut_tokens} cut" if example.cut_tokens else ""), style="bold"))
        console.print(_render_tokens(example, encoder, ids=ids, has_colors=console.color_system is not None))
        console.print()


def _render_tokens(example: EncodedExample, encoder: Encoder, *, ids: bool, has_colors: bool) -> Text:
    text = Text()
    position = 0
    for start, end in [*iter_spans(example.label_spans), (len(example.input_ids),) * 2]:
        text.append(_decode(example.input_ids[position:start], encoder, ids=ids), style=_CONTEXT_STYLE)
        labeled = _decode(example.input_ids[start:end], encoder, ids=ids)
        if labeled:
            text.append(labeled if has_colors else f"⟦{labeled}⟧", style=_LABEL_STYLE)
        position = end
    if example.cut_tokens:
        text.append(f" [{example.cut_tokens} tokens cut]", style=_CUT_STYLE)
    return text


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
