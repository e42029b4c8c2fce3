"""One torch optimizer that steps its groups of matrices with Muon and all others with AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from peftbench.optim.muon import MATRIX_KEY


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps the groups that have Muon's keys with torch's Muon, and the others with torch's AdamW."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self._inner: dict[bool, torch.optim.Optimizer] = {}
        """The two optimizers; the key is True for Muon."""
        for is_muon, optimizer_class in ((True, torch.optim.Muon), (False, torch.optim.AdamW)):
            if selected := self._select_groups(is_muon=is_muon):
                # The constructor adds the defaults of missing options to the groups, which are shared with it.
                self._inner[is_muon] = optimizer_class(selected)

    def _select_groups(self, *, is_muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if (MATRIX_KEY in group) == is_muon]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Step all parameters."""
        loss = closure() if closure is not None else None
        for is_muon, inner in self._inner.items():
            # Engines and checkpoints replace the groups and states of this optimizer.
            inner.param_groups, inner.state = self._select_groups(is_muon=is_muon), self.state
            inner.step()
        return loss
