"""RankMeasurements: what all ranks measured, gathered once at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from peftbench.distributed.collectives import all_gather_objects
from peftbench.record import Memory, StateBytes

if TYPE_CHECKING:
    from accelerate import Accelerator

    from peftbench.profiler.probe import Probe

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class RankMeasurements:
    """Measurements of all ranks; empty if a rank did not reach the end of the run."""

    memory_by_rank: tuple[dict[str, Memory], ...] = ()
    step_memory_by_rank: tuple[dict[str, Memory], ...] = ()
    cuda_context_bytes: int | None = None
    """The largest of any rank."""
    counted_flops: int | None = None
    """FLOPs of one step, summed over ranks."""
    energy_joules: float | None = None
    """Energy of training, summed over ranks."""
    matmul_flops: float | None = None
    """Measured FLOP/s of a large matrix product, summed over ranks."""
    state_bytes_by_rank: tuple[StateBytes, ...] = ()

    @classmethod
    def gather(
        cls,
        accelerator: Accelerator,
        probe: Probe,
        *,
        counted_flops: int | None,
        state_bytes: StateBytes | None,
        matmul_flops: float | None = None,
    ) -> RankMeasurements:
        """Gather this rank's measurements with those of all others. Collective: every rank must call it."""
        local = (
            dict(probe.memory),
            dict(probe.step_memory),
            probe.memory_meter.cuda_context_bytes,
            counted_flops,
            probe.phase_joules.get("train"),
            matmul_flops,
            state_bytes,
        )
        memory, step_memory, contexts, flop_counts, joules, matmul_rates, states = zip(
            *all_gather_objects(accelerator, local), strict=True
        )
        return cls(
            memory,
            step_memory,
            max((size for size in contexts if size is not None), default=None),
            _sum_if_all_known(flop_counts),
            _sum_if_all_known(joules),
            _sum_if_all_known(matmul_rates),
            tuple(state for state in states if state is not None),
        )


def _sum_if_all_known(values: Sequence[N | None]) -> N | None:
    """Return the sum over ranks, None if a rank's value is unknown."""
    known = [value for value in values if value is not None]
    return sum(known[1:], known[0]) if len(known) == len(values) else None
