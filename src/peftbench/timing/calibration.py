"""Measure the speeds of this machine: products and attention by size, bytes per second by class, launch time."""

from __future__ import annotations

import datetime
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch.nn import functional
from torch.utils.benchmark import Timer
from torch.utils.benchmark import timer as benchmark_clock

from peftbench.common.dtypes import TORCH_DTYPES
from peftbench.timing.kernel_classes import classify_kernel
from peftbench.timing.kernels import TRAFFIC_KERNELS, TrafficKernel, make_adamw8bit
from peftbench.timing.operations import Operation, OperationCounts, OperationLog
from peftbench.timing.roofline import StepSize, predict_step_time
from peftbench.timing.speeds import AttentionPoint, MeasuredSpeeds, ProductPoint, TrafficPoint

_SECONDS_PER_POINT = 0.02
_SECONDS_PER_SAMPLE = 3e-4
_MIN_SAMPLES = 5
_POOL_BYTES = 96 << 20
"""Total bytes of the inputs between which an operation alternates: more than a CPU's cache holds, as in a step."""
_MAX_POOL = 32


@dataclass(frozen=True)
class CalibrationSizes:
    """The sizes to measure."""

    linears: tuple[tuple[int, int, int], ...]
    """(tokens, inputs, outputs) of linear layers; forward, gradient of the input and of the weight are measured."""
    batched: tuple[tuple[int, int, int, int], ...]
    """(batch, m, n, k) of batched products."""
    attention: tuple[tuple[int, int, int], ...]
    """(batch x heads, length, width)."""
    values: tuple[int, ...]
    """Numbers of values of the operations that move bytes."""


CPU_SIZES = CalibrationSizes(
    linears=(
        (32, 256, 256),
        (128, 256, 1024),
        (128, 1024, 256),
        (512, 256, 256),
        (512, 256, 4096),
        (512, 768, 768),
        (1024, 256, 8),
        (1024, 8, 256),
        (1024, 256, 16),
        (1024, 16, 768),
        (1024, 768, 16),
        (1024, 256, 256),
        (1024, 256, 768),
        (1024, 256, 1024),
        (1024, 1024, 256),
        (1024, 768, 768),
        (1024, 768, 3072),
        (4096, 256, 1024),
        (4096, 128, 128),
        (256, 2048, 2048),
        (128, 768, 16384),
    ),
    batched=((32, 128, 128, 64), (32, 128, 64, 128), (16, 512, 512, 64), (16, 512, 64, 512)),
    attention=((32, 64, 32), (32, 64, 64), (32, 128, 64), (32, 256, 64), (16, 256, 128), (8, 512, 64), (8, 1024, 64)),
    values=(1 << 12, 1 << 15, 1 << 18, 1 << 20, 1 << 22),
)
CUDA_SIZES = CalibrationSizes(
    linears=(
        (128, 768, 768),
        (1024, 768, 768),
        (1024, 768, 3072),
        (4096, 768, 16),
        (4096, 16, 768),
        (4096, 768, 768),
        (4096, 768, 3072),
        (4096, 3072, 768),
        (4096, 2048, 8192),
        (4096, 4096, 4096),
        (8192, 4096, 14336),
        (512, 768, 50257),
        (512, 4096, 128256),
    ),
    batched=((96, 1024, 1024, 64), (96, 1024, 64, 1024)),
    attention=((96, 256, 64), (96, 1024, 64), (64, 1024, 128), (32, 4096, 128)),
    values=(1 << 16, 1 << 20, 1 << 23, 1 << 26),
)


class Progress(Protocol):
    """Shows how many measurements are done, like tqdm."""

    total: Any

    def update(self, n: int = 1, /) -> object:
        """Count ``n`` more measurements."""


def measure_speeds(
    device: torch.device, machine: str, progress: Progress, sizes: CalibrationSizes | None = None
) -> MeasuredSpeeds:
    """Measure the speeds of ``device``, with the number of threads that torch uses now."""
    sizes = sizes or (CUDA_SIZES if device.type == "cuda" else CPU_SIZES)
    dtypes = _list_dtypes(device)
    jobs: list[Callable[[], Any]] = [
        *_iter_product_jobs(sizes, dtypes, device),
        *_iter_attention_jobs(sizes, dtypes, device),
        *_iter_traffic_jobs(sizes, dtypes, device),
    ]
    progress.total = len(jobs) + 1
    points = []
    for job in jobs:
        points.append(job())
        progress.update()
    speeds = MeasuredSpeeds(
        machine=machine,
        torch_version=str(torch.__version__),
        num_threads=torch.get_num_threads(),
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        overlaps_launches=device.type == "cuda",
        products=tuple(point for point in points if isinstance(point, ProductPoint)),
        attention=tuple(point for point in points if isinstance(point, AttentionPoint)),
        traffic=tuple(point for point in points if isinstance(point, TrafficPoint)),
        seconds_per_launch=1e-6,
    )
    launch = measure_launch_seconds(device, speeds)
    progress.update()
    return speeds.model_copy(update={"seconds_per_launch": launch})


def _list_dtypes(device: torch.device) -> tuple[str, ...]:
    """Return the types of products to measure: fp16 only on a GPU, since no CPU recipe is faster with it."""
    if device.type == "cpu":
        return "fp32", "bf16"
    return ("fp32", "fp16", "bf16") if torch.cuda.is_bf16_supported(including_emulation=False) else ("fp32", "fp16")


def measure_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the lower quartile of the seconds of ``run``, which other processes on the machine affect least.

    With one thread on a CPU, it is the thread's own time, in which other processes do not count.
    """
    is_one_cpu_thread = torch.get_num_threads() == 1 and device.type == "cpu"
    clock = time.thread_time if is_one_cpu_thread else benchmark_clock
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads(), timer=clock)
    timer.timeit(1)  # selects the kernel
    number = min(100, max(1, round(_SECONDS_PER_SAMPLE / timer.timeit(1).mean)))
    samples: list[float] = []
    while len(samples) < _MIN_SAMPLES or sum(samples) * number < _SECONDS_PER_POINT:
        samples.append(timer.timeit(number).mean)
    return sorted(samples)[len(samples) // 4]


def _iter_product_jobs(
    sizes: CalibrationSizes, dtypes: Sequence[str], device: torch.device
) -> Iterator[Callable[[], ProductPoint]]:
    shapes: dict[tuple[tuple[int, int, int, int], str], None] = {}
    for tokens, inputs, outputs in sizes.linears:
        shapes[(1, tokens, outputs, inputs), "nn"] = None
        shapes[(1, tokens, outputs, inputs), "nt"] = None
        shapes[(1, tokens, inputs, outputs), "nt"] = None
        shapes[(1, inputs, outputs, tokens), "tn"] = None
    for dims in sizes.batched:
        shapes[dims, "nn"] = None
    for (dims, layout), dtype in itertools.product(shapes, dtypes):
        yield lambda dims=dims, layout=layout, dtype=dtype: _measure_product(dims, layout, dtype, device)  # type: ignore[misc]


def _measure_product(dims: tuple[int, int, int, int], layout: str, dtype: str, device: torch.device) -> ProductPoint:
    batch, m, n, k = dims
    multiply = torch.bmm if batch > 1 else torch.mm

    def make() -> tuple[torch.Tensor, ...]:
        left = _make_factor((batch, m, k), layout[0], dtype, device)
        right = _make_factor((batch, k, n), layout[1], dtype, device)
        return (left, right) if batch > 1 else (left[0], right[0])

    nbytes = batch * (m * k + k * n + m * n) * TORCH_DTYPES[dtype].itemsize
    run = _take_turns(multiply, [make() for _ in range(_count_copies(nbytes))])
    return ProductPoint(dims=dims, layout=layout, dtype=dtype, seconds=measure_seconds(run, device))


def _count_copies(nbytes: int) -> int:
    """Return how many copies of an operation's tensors of ``nbytes`` exceed a CPU's cache together."""
    return max(1, min(_MAX_POOL, _POOL_BYTES // nbytes))


def _take_turns(run: Callable[..., object], pool: Sequence[Sequence[Any]]) -> Callable[[], None]:
    """Return a call of ``run`` with the next arguments of ``pool``, which keeps its result until their next turn.

    As in a step, inputs are not in the cache, and each result is in other memory than the previous one.
    """
    results: list[object] = [None] * len(pool)
    turns = itertools.cycle(range(len(pool)))

    def run_next() -> None:
        turn = next(turns)
        results[turn] = run(*pool[turn])

    return run_next


def _make_factor(shape: tuple[int, int, int], layout: str, dtype: str, device: torch.device) -> torch.Tensor:
    """Return matrices of (batch, rows, columns) that are stored row by row (n) or transposed (t)."""
    batch, rows, columns = shape
    stored = (batch, rows, columns) if layout == "n" else (batch, columns, rows)
    values = torch.randn(stored, device=device).to(TORCH_DTYPES[dtype])
    return values if layout == "n" else values.transpose(1, 2)


def _iter_attention_jobs(
    sizes: CalibrationSizes, dtypes: Sequence[str], device: torch.device
) -> Iterator[Callable[[], AttentionPoint]]:
    names = ("fp32",) if device.type == "cpu" else dtypes  # on CPU attention is computed in float32
    for shape, dtype, direction in itertools.product(sizes.attention, names, ("forward", "backward")):
        yield lambda s=shape, t=dtype, d=direction: _measure_attention(s, t, d, device)  # type: ignore[misc]


def _measure_attention(
    shape: tuple[int, int, int], dtype: str, direction: Literal["forward", "backward"], device: torch.device
) -> AttentionPoint:
    heads, length, width = shape

    def make() -> tuple[torch.Tensor, ...]:
        factors = (torch.randn((1, heads, length, width), device=device).to(TORCH_DTYPES[dtype]) for _ in range(3))
        inputs = tuple(factor.requires_grad_() for factor in factors)
        if direction == "forward":
            return inputs
        output = _attend(*inputs)
        return (output, *inputs, torch.randn_like(output))

    run = _attend if direction == "forward" else _differentiate
    pool = [make() for _ in range(_count_copies(heads * length * width * TORCH_DTYPES[dtype].itemsize * 4))]
    flops = sum(operation.flops * count for operation, count in _log(lambda: run(*pool[0])).items())
    return AttentionPoint(
        dims=(heads, length, length, width),
        direction=direction,
        dtype=dtype,
        flops=flops,
        seconds=measure_seconds(_take_turns(run, pool), device),
    )


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def _differentiate(output: torch.Tensor, *inputs_and_gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    *inputs, gradient = inputs_and_gradient
    return torch.autograd.grad(output, inputs, gradient, retain_graph=True)


def _iter_traffic_jobs(
    sizes: CalibrationSizes, dtypes: Sequence[str], device: torch.device
) -> Iterator[Callable[[], TrafficPoint]]:
    optional = make_adamw8bit()
    for kernel in (*TRAFFIC_KERNELS, *([optional] if optional else [])):
        names = dtypes if kernel.is_in_steps_of_any_type else ("fp32",)
        for num_values, dtype in itertools.product(sizes.values, names):
            yield lambda k=kernel, n=num_values, t=dtype: _measure_traffic(k, n, t, device)  # type: ignore[misc]


def _measure_traffic(kernel: TrafficKernel, num_values: int, dtype: str, device: torch.device) -> TrafficPoint:
    """Measure an operation whose inputs are not in the cache and whose result is new memory, as in a step."""
    torch_dtype = TORCH_DTYPES[dtype]
    copies = _count_copies(num_values * torch_dtype.itemsize * 3)
    pool = [kernel.make_arguments(num_values, torch_dtype, device) for _ in range(copies)]
    nbytes = sum(
        operation.nbytes * count
        for operation, count in _log(lambda: kernel.run(*pool[0])).items()
        if classify_kernel(operation.name) == kernel.kernel_class
    )
    seconds = measure_seconds(_take_turns(kernel.run, pool), device)
    return TrafficPoint(kernel_class=kernel.kernel_class, dtype=dtype, nbytes=nbytes, seconds=seconds)


def _log(run: Callable[[], object], part: str = "forward") -> OperationCounts:
    log = OperationLog(lambda: part)
    with log:
        run()
    return log.count_step(1)


def measure_launch_seconds(device: torch.device, speeds: MeasuredSpeeds) -> float:
    """Return the seconds of a launch with which the predicted time of a tiny step equals the measured one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=4, n_embd=16, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).train()
    model.to(device=device)  # type: ignore[arg-type, call-arg]
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    tokens = torch.zeros((2, 8), dtype=torch.long, device=device)

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    measured, counts = measure_seconds(step, device), _log(step)
    return max(_solve_launch_seconds(counts, speeds, measured), 1e-7)


def _solve_launch_seconds(counts: dict[Operation, int], speeds: MeasuredSpeeds, measured: float) -> float:
    """Return the launch time with which ``counts`` are predicted to take ``measured`` seconds."""
    predicted = predict_step_time(counts, speeds, StepSize(1, 1))
    launches = predicted.seconds_by_kind["launch"][0] / speeds.launch_seconds[0]
    busy = sum(seconds[0] for kind, seconds in predicted.seconds_by_kind.items() if kind != "launch")
    return (measured if speeds.overlaps_launches else measured - busy) / launches
