"""Measure what a new tensor shape costs on a CPU: attention in 16 bits or float32, rows of any length or of a multiple.

Run: python benchmarks/cpu_sizes/sizes.py
Each case runs in its own process: GPT-2 small's attention or its four matrices, forward and backward, over rows of
random lengths.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import torch
from tabulate import tabulate

from peftbench.data.collate import PackedSequences
from peftbench.modeling import attention
from peftbench.profiler.memory import read_proc_status_bytes

MIB = 2**20
HEADS, WIDTH = 12, 64
SHORTEST, LONGEST = 200, 1000
"""Document lengths; a row has two documents."""
TIMES = 150
Case = tuple[str, str, int]
CASES: tuple[Case, ...] = (
    ("attention", "16 bits", 1),
    ("attention", "float32", 1),
    ("matrices", "16 bits", 1),
    ("matrices", "16 bits", 16),
    ("matrices", "16 bits", 64),
    ("matrices", "float32", 1),
)


def build_attention_pass(kind: str) -> Callable[[int], object]:
    """Build the forward and backward pass of two documents in a row, as in training or as torch's default."""
    if kind == "16 bits":
        attention._is_upcast_to_float32 = _never
    layer = torch.nn.Module()

    def once(positions: int) -> None:
        row = (1, HEADS, positions, WIDTH)
        query, key, value = (torch.randn(row, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        documents = PackedSequences.from_lengths([positions // 2, positions - positions // 2])
        attention.causal_attention(layer, query, key, value, None, packed_sequences=documents)[0].sum().backward()

    return once


def _never(query: torch.Tensor) -> bool:
    return False


def build_matrix_pass(kind: str) -> Callable[[int], object]:
    """Build the forward and backward pass of a block's four matrices."""
    dtype = torch.bfloat16 if kind == "16 bits" else torch.float32
    shapes = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
    layers = [torch.nn.Linear(*shape, dtype=dtype) for shape in shapes]

    def once(positions: int) -> None:
        for layer in layers:
            row = torch.randn(1, positions, layer.in_features, dtype=dtype).requires_grad_()
            layer(row).sum().backward()

    return once


def measure(what: str, kind: str, multiple: int) -> tuple[float, float, float]:
    """Return milliseconds of a length's first and second pass (medians), and bytes the process kept at the end."""
    once = (build_attention_pass if what == "attention" else build_matrix_pass)(kind)
    drawn, timed = torch.Generator().manual_seed(0), []
    once(LONGEST)
    before = _resident()
    for _ in range(TIMES):
        positions = 2 * int(torch.randint(SHORTEST, LONGEST + 1, (), generator=drawn))
        positions += -positions % multiple
        start = time.perf_counter()
        once(positions)
        between = time.perf_counter()
        once(positions)
        timed.append((between - start, time.perf_counter() - between))
    first, second = (1000 * statistics.median(seconds) for seconds in zip(*timed, strict=True))
    return first, second, _resident() - before


def _resident() -> int:
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return read_proc_status_bytes("VmRSS") or 0


def main() -> None:
    """Measure each case in its own process and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="torch threads (2)")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case is not None:
        print(*measure(*CASES[args.case]))
        return
    table = []
    for index, case in enumerate(CASES):
        command = [sys.executable, __file__, "--threads", str(args.threads), "--case", str(index)]
        first, second, kept = map(float, subprocess.check_output(command, text=True).split())  # noqa: S603
        table.append([*case, f"{first:.1f}", f"{second:.1f}", f"{first / second:.2f}x", f"{kept / MIB:,.0f}"])
    heads = ["what", "in", "rows of a multiple of", "first time, ms", "second, ms", "first / second", "kept, MiB"]
    print(tabulate(table, headers=heads, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
