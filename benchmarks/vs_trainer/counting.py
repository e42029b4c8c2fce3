"""FLOPs of what the peers dispatch, with two products that peftbench's own loop never calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import shape_wrapper

from peftbench.profiler.counter import FlopCounter


class PeerCounter(FlopCounter):
    """Knows ``addmm_``, and ``addmm`` into another type, by which TRL sums the gradients of its chunks."""

    def __init__(self) -> None:
        super().__init__()
        aten = torch.ops.aten
        self._formulas |= {aten.addmm: shape_wrapper(_addmm), aten.addmm_: shape_wrapper(_addmm)}


def _addmm(_into: object, left: Sequence[int], right: Sequence[int], *_: object, **__: object) -> int:
    return int(2 * left[0] * left[1] * right[1])
