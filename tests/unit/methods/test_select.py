"""Selective tuning: which parameters are trained, where the backward pass ends, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
