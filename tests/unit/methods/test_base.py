"""The attributes of a method's class."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest

from peftbench.methods.base import Method


def test_quantized_base_requires_a_frozen_base() -> None:
    """A class that trains the base model's matrices cannot claim that they may be quantized."""
    with pytest.raises(TypeError, match="Trains supports a quantized base, so it must set keeps_base_frozen = True"):

        class Trains(Method):
            supports_quantized_base: ClassVar[bool] = True
            kind: Literal["trains"] = "trains"

    class Frozen(Method):
        keeps_base_frozen: ClassVar[bool] = True
        supports_quantized_base: ClassVar[bool] = True
        kind: Literal["frozen"] = "frozen"

    assert Frozen().supports_quantized_base
