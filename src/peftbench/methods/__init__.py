"""METHODS: fine-tuning methods and baselines, each with one file and one entry here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from peftbench.methods.base import Method
from peftbench.methods.baselines import FewShot, Lead, Majority, ZeroShot
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning

METHODS: dict[str, type[Method]] = {
    "full": Full,
    "last_layer": LastLayer,
    "lora": Lora,
    "prompt_tuning": PromptTuning,
}

BASELINES: dict[str, type[Method]] = {
    "zero_shot": ZeroShot,
    "few_shot": FewShot,
    "majority": Majority,
    "lead": Lead,
}

METHOD_KINDS = METHODS | BASELINES
"""Every value of ``method.kind``."""

if TYPE_CHECKING:
    AnyMethod = Method
else:
    AnyMethod = Annotated[Union[tuple(METHOD_KINDS.values())], Field(discriminator="kind")]
