"""Speeds of a device: how long each kind of operation takes, from measurements or from a data sheet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from peftbench.timing.kernel_classes import KernelClass, classify_kernel
from peftbench.timing.operations import Operation

SecondsRange = tuple[float, float]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_FALLBACK_CLASS: dict[KernelClass, KernelClass] = {"adamw8bit": "adamw"}
"""A class to use if a class was not measured: its library was not installed."""


class MissingSpeedError(Exception):
    """The speeds do not cover an operation; the message is a clause."""


class DeviceSpeeds(Protocol):
    """Times of single operations on one device."""

    @property
    def overlaps_launches(self) -> bool:
        """True if the host launches operations while the device runs earlier ones, as on a GPU."""

    @property
    def launch_seconds(self) -> SecondsRange:
        """Seconds in which the host launches one operation."""

    @property
    def basis(self) -> str:
        """Return the source of the speeds, as a clause."""

    def estimate_operation(self, operation: Operation) -> SecondsRange:
        """Return the seconds of one operation without its launch: minimum and maximum.

        Raises:
            MissingSpeedError: the speeds do not cover it.
        """


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ProductPoint(_Frozen):
    """The measured time of one shape of matrix product."""

    dims: tuple[int, int, int, int]
    """(batch, m, n, k)."""
    layout: str
    """Layout of both factors, e.g. nt (:attr:`peftbench.timing.operations.Operation.layout`)."""
    dtype: str
    seconds: _Positive

    @property
    def flops(self) -> int:
        """FLOPs of the product."""
        return 2 * math.prod(self.dims)


class AttentionPoint(_Frozen):
    """The measured time of causal attention of one shape."""

    dims: tuple[int, int, int, int]
    """(batch x heads, queries, keys, width)."""
    direction: Literal["forward", "backward"]
    dtype: str
    flops: int = Field(gt=0)
    """FLOPs by the formula with which a step's operations are counted."""
    seconds: _Positive


class TrafficPoint(_Frozen):
    """The measured time of one operation that moves bytes."""

    kernel_class: KernelClass
    dtype: str
    nbytes: int = Field(gt=0)
    """Bytes read and written, counted as in a step."""
    seconds: _Positive


class MeasuredSpeeds(_Frozen):
    """Speeds that ``peftbench calibrate`` measured on one machine."""

    machine: str
    torch_version: str
    num_threads: int = Field(gt=0)
    measured_at: str
    overlaps_launches: bool
    products: tuple[ProductPoint, ...] = Field(min_length=1)
    attention: tuple[AttentionPoint, ...] = Field(min_length=1)
    traffic: tuple[TrafficPoint, ...] = Field(min_length=1)
    seconds_per_launch: _Positive
    """Seconds of one operation of a step in Python, autograd and torch's dispatcher."""
    link_bytes_per_second: _Positive | None = None
    """Bytes per second that one process sends to another; None if not measured."""

    @property
    def launch_seconds(self) -> SecondsRange:
        return self.seconds_per_launch, self.seconds_per_launch

    @property
    def basis(self) -> str:
        return f"from measurements on {self.machine} with {self.num_threads} threads, torch {self.torch_version}"

    def estimate_operation(self, operation: Operation) -> SecondsRange:
        seconds = self._seconds(operation)
        return seconds, seconds

    def _seconds(self, operation: Operation) -> float:
        if operation.kind == "product":
            return operation.flops / self._product_rate(operation)
        if operation.kind == "attention":
            return operation.flops / self._attention_rate(operation)
        if operation.kind == "exchange":
            if not operation.nbytes:
                return 0.0
            if self.link_bytes_per_second is None:
                raise MissingSpeedError("the bandwidth between processes was not measured")
            return operation.nbytes / self.link_bytes_per_second
        if not operation.nbytes:
            return 0.0
        return _interpolate_seconds(self._traffic_table(classify_kernel(operation.name), operation.dtype), operation)

    def _product_rate(self, operation: Operation) -> float:
        """Return FLOP/s of a product, from the measured shapes nearest to it."""
        points = self._products_by_dtype.get(operation.dtype)
        if points is None:
            raise MissingSpeedError(f"products in {operation.dtype} were not measured")
        return _average_rate(
            operation.dims,
            [
                (point.dims, 0.0 if point.layout == operation.layout else 1.0, point.flops / point.seconds)
                for point in points
            ],
        )

    def _attention_rate(self, operation: Operation) -> float:
        direction = "backward" if "backward" in operation.name else "forward"
        points = [point for point in self.attention if point.direction == direction and point.dtype == operation.dtype]
        if not points:
            raise MissingSpeedError(f"attention in {operation.dtype} was not measured")
        # Full attention computes twice the pairs of causal attention at about the same rate.
        return _average_rate(operation.dims, [(point.dims, 0.0, point.flops / point.seconds) for point in points])

    def _traffic_table(self, kernel_class: KernelClass, dtype: str) -> Sequence[TrafficPoint]:
        """Return the points of a class, in the operation's type if measured, else in fp32."""
        classes = (kernel_class, _FALLBACK_CLASS.get(kernel_class, kernel_class))
        for candidate in classes:
            for name in (dtype, "fp32"):
                if table := self._traffic_tables.get((candidate, name)):
                    return table
        raise MissingSpeedError(f"operations of the class {kernel_class} were not measured")

    @cached_property
    def _products_by_dtype(self) -> dict[str, list[ProductPoint]]:
        tables: dict[str, list[ProductPoint]] = {}
        for point in self.products:
            tables.setdefault(point.dtype, []).append(point)
        return tables

    @cached_property
    def _traffic_tables(self) -> dict[tuple[str, str], list[TrafficPoint]]:
        tables: dict[tuple[str, str], list[TrafficPoint]] = {}
        for point in sorted(self.traffic, key=lambda point: point.nbytes):
            tables.setdefault((point.kernel_class, point.dtype), []).append(point)
        return tables


def _average_rate(dims: Sequence[int], points: Iterable[tuple[Sequence[int], float, float]]) -> float:
    """Return the rate at ``dims``: the geometric mean of measured rates, weighted by the distance in log2 to the -4.

    Each point is (dims, extra distance, rate). Dimensions beyond the measured range count as at its end, because rates
    are constant for large shapes.
    """
    rows = list(points)
    bounds = [(min(row[0][i] for row in rows), max(row[0][i] for row in rows)) for i in range(len(dims))]
    logs = [math.log2(min(max(size, low), high)) for size, (low, high) in zip(dims, bounds, strict=True)]
    total, weighted = 0.0, 0.0
    for known, extra, rate in rows:
        square = extra**2 + sum((a - math.log2(b)) ** 2 for a, b in zip(logs, known, strict=True))
        weight = 1 / (square + 1e-3) ** 2
        total += weight
        weighted += weight * math.log(rate)
    return math.exp(weighted / total)


def _interpolate_seconds(table: Sequence[TrafficPoint], operation: Operation) -> float:
    """Return the seconds for ``operation.nbytes``: linear in log-log between points, at a constant rate beyond."""
    nbytes = operation.nbytes
    if nbytes <= table[0].nbytes:
        return table[0].seconds * nbytes / table[0].nbytes
    for low, high in itertools.pairwise(table):
        if nbytes <= high.nbytes:
            share = math.log(nbytes / low.nbytes) / math.log(high.nbytes / low.nbytes)
            return low.seconds * math.exp(share * math.log(high.seconds / low.seconds))
    return table[-1].seconds * nbytes / table[-1].nbytes
