"""Every method once, and parametrised marks over methods and architectures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from peftbench.methods.base import Method
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from tests.helpers.models import ARCHITECTURES

if TYPE_CHECKING:
    pass

ONE_OF_EACH: dict[str, Method] = {
    "full": Full(),
    "last_layer": LastLayer(),
    "lora": Lora(r=4),
    "prompt_tuning": PromptTuning(num_virtual_tokens=5),
}
"""Every method once, as plain as can be; the conformance battery proves that none is missing."""


every_method = pytest.mark.parametrize("method", ONE_OF_EACH.values(), ids=ONE_OF_EACH)
"""Runs a test for every method, for what does not depend on a method's variants."""


every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
"""Runs a test for every small architecture."""
