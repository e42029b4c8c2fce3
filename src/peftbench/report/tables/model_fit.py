"""Table of the methods of a model that fit a device."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from io import StringIO
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftbench.report.text.escape import terminal_safe

if TYPE_CHECKING:
    from peftbench.memory.model_fit.answer import FitAnswer, MethodFit

TABLE_WIDTH = 100
"""Characters of the longest line."""
_GIB = 2**30
_UNKNOWN = "–"
_VERDICTS = {"fits": "fits", "too close to say": "too close", "does not fit": "no", None: _UNKNOWN}
"""Text of a verdict in the table."""


def format_model_fit(answer: FitAnswer) -> str:
    """Return a table of the methods, what would make the others fit, and what the answer assumes."""
    console = Console(file=StringIO(), width=TABLE_WIDTH)
    with console.capture() as capture:
        console.print(_build_table(answer))
    table = "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())
    lines = [_wrap(line) for line in (*_iter_changes(answer), *_iter_notes(answer))]
    return "\n".join((_wrap(_describe(answer)), "", table, "", *lines))


def _describe(answer: FitAnswer) -> str:
    """Return the model, the device, the budget and the number of methods that fit."""
    fitting = sum(row.fits for row in answer.methods)
    count = f"{fitting} of {len(answer.methods)} methods surely fit"
    return (
        f"{terminal_safe(answer.model)} ({_format_count(answer.parameters)} parameters) on "
        f"{terminal_safe(answer.device_name)} with {answer.budget_bytes / _GIB:.2f} GiB: {count}"
    )


def _build_table(answer: FitAnswer) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    has_price = any(row.speed is not None and row.speed.price is not None for row in answer.methods)
    has_host = any(row.host_bytes is not None for row in answer.methods)
    heads = [
        "method",
        f"{_format_tokens(answer.reference_length)}\ntokens",
        "peak\nGiB",
        "process\nGiB",
        *(["CPU\nGiB"] if has_host else []),
        *(f"rows\nat {_format_tokens(length)}" for length in answer.column_lengths),
        "longest\ncontext",
        "tok/s",
        "hours",
        *(["price"] if has_price else []),
    ]
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index < 2 else "right", no_wrap=True)
    for row in answer.methods:
        table.add_row(*map(Text, _format_row(row, answer, has_host=has_host, has_price=has_price)))
    return table


def _format_row(row: MethodFit, answer: FitAnswer, *, has_host: bool, has_price: bool) -> list[str]:
    plan, speed = row.plan, row.speed
    limits = [f"{limit.rows}{'+' if limit.is_largest_tried else ''}" for limit in row.micro_batches]
    price = speed.price if speed is not None else None
    host = [_UNKNOWN if row.host_bytes is None else f"{row.host_bytes / _GIB:.1f}"] if has_host else []
    return [
        row.title,
        _VERDICTS[row.verdict],
        _UNKNOWN if plan is None else f"{plan.peak.allocated_bytes / _GIB:.1f}",
        _UNKNOWN if plan is None else "–".join(f"{size / _GIB:.1f}" for size in plan.process_bytes),
        *host,
        *(limits or [_UNKNOWN] * len(answer.column_lengths)),
        _UNKNOWN if row.longest_context is None else f"{row.longest_context:,}",
        _UNKNOWN if speed is None else _format_range(speed.tokens_per_second),
        _UNKNOWN if speed is None else _format_range(speed.hours),
        *([_UNKNOWN if price is None else _format_range(price)] if has_price else []),
    ]


def _format_tokens(length: int) -> str:
    """Return e.g. 4k for 4,096 tokens; a number that is not a multiple of 1,024 is returned in full."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _format_count(number: int) -> str:
    """Return e.g. "8.03 billion" or "124 million"."""
    return f"{number / 1e9:.3g} billion" if number >= 1e9 else f"{number / 1e6:.3g} million"


def _format_range(values: tuple[float, float]) -> str:
    """Return e.g. "0.31–1.2" or "12k–45k"; one number if both are equal."""
    least, most = map(_format_amount, values)
    return least if least == most else f"{least}–{most}"


def _format_amount(value: float) -> str:
    """Return two digits of a number, e.g. 0.31, 4.2, 87, 140 or 45k."""
    if value < 0.01:
        return "<0.01"
    rounded = float(f"{value:.2g}")
    if rounded >= 1000:
        return f"{rounded / 1000:g}k"
    return f"{rounded:g}"


def _iter_changes(answer: FitAnswer) -> Iterator[str]:
    """Yield, for each method that does not fit, the cheapest change with which it would fit, or why it has no plan."""
    for row in answer.methods:
        if row.change is not None:
            yield f"to fit {row.title}: {row.change}"
        if row.reason is not None:
            yield f"no plan of {row.title}: {terminal_safe(row.reason)}"


def _iter_notes(answer: FitAnswer) -> Iterator[str]:
    length = _format_tokens(answer.reference_length)
    yield (
        f"note: verdict, peak and process are for one row of {length} tokens; rows: the largest micro-batch that "
        "surely fits; longest context: the longest single row that surely fits"
    )
    yield (f"note: hours are for {answer.num_examples:,} examples of {answer.tokens_per_example:,.0f} tokens, one pass")
    bases = dict.fromkeys(row.speed.basis for row in answer.methods if row.speed is not None)
    yield from (f"note: speeds are predicted {basis}" for basis in bases)
    if not bases:
        yield "note: no speed is predicted: the device's speeds are unknown, or see the plans' notes in --json"
    yield from (f"note: {terminal_safe(note)}" for note in answer.notes)


def _wrap(line: str) -> str:
    return textwrap.fill(line, TABLE_WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
