"""METHODS: fine-tuning methods and baselines, each with one file and one entry here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import SerializeAsAny, ValidationInfo, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticKnownError

from peftbench.methods.base import Method
from peftbench.methods.baselines import FewShot, Lead, Majority, ZeroShot
from peftbench.methods.full import Full
from peftbench.methods.last_layer import LastLayer
from peftbench.methods.lora import Lora
from peftbench.methods.peft_kinds import PRESETS, PeftByType, build_preset
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
"""The kinds of each family of methods. The compatibility table treats a family as one method, by its first kind."""

BASELINES: dict[str, type[Method]] = {
    "zero_shot": ZeroShot,
    "few_shot": FewShot,
    "majority": Majority,
    "lead": Lead,
}


class _MethodKinds(Mapping[str, type[Method]]):
    """Maps each value of ``method.kind`` to its section. Sections of peft's types are built when they are looked up."""

    def __init__(self) -> None:
        self._built: dict[str, type[Method]] = (
            METHODS | BASELINES | {PeftByType.model_fields["kind"].default: PeftByType}
        )

    def __getitem__(self, kind: str) -> type[Method]:
        return self._built[kind] if kind in self._built or kind not in PRESETS else build_preset(kind)

    def __iter__(self) -> Iterator[str]:
        yield from (*self._built, *PRESETS)

    def __len__(self) -> int:
        return len(self._built) + len(PRESETS)

    def __contains__(self, kind: object) -> bool:
        return kind in self._built or kind in PRESETS


METHOD_KINDS = _MethodKinds()
"""Every value of ``method.kind``."""


def _validate(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Method:
    """Validate the values of ``method`` with the section of its kind."""
    if isinstance(value, Method):
        return value
    if not isinstance(value, Mapping) or "kind" not in value:
        raise PydanticKnownError("union_tag_not_found", {"discriminator": "'kind'"})
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in METHOD_KINDS:
        context = {"discriminator": "'kind'", "tag": str(kind), "expected_tags": ", ".join(METHOD_KINDS)}
        raise PydanticKnownError("union_tag_invalid", context)
    section = METHOD_KINDS[kind].select_section(value)
    if info.mode == "json":  # a recipe is validated strictly
        return section.model_validate_json(json.dumps(value), strict=True)
    return section.model_validate(value)


if TYPE_CHECKING:
    AnyMethod = Method
else:
    AnyMethod = Annotated[SerializeAsAny[Method], WrapValidator(_validate)]
