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
from peftbench.methods.select import Select
from peftbench.methods.select_presets import Attention, BitFit, Embeddings, LastBlocks, LayerNorm

METHODS: dict[str, type[Method]] = {
    "full": Full,
    "last_layer": LastLayer,
    "lora": Lora,
    "prompt_tuning": PromptTuning,
    "select": Select,
    "bitfit": BitFit,
    "layer_norm": LayerNorm,
    "embeddings": Embeddings,
    "last_blocks": LastBlocks,
    "attention": Attention,
}

METHOD_FAMILIES: dict[str, tuple[str, ...]] = {
    family: tuple(kind for kind, method in METHODS.items() if method.family == family)
    for family in dict.fromkeys(method.family for method in METHODS.values())
}
"""The kinds of each family of methods, which have one row of the compatibility table; the first represents it."""

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
