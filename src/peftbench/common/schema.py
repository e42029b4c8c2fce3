"""Base classes of recipe sections and of records."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict

from peftbench.common.text import expand_home

PathText = Annotated[str, AfterValidator(expand_home)]
"""The path of a file or folder; a leading ``~`` is expanded."""


class ConfigSection(BaseModel):
    """A frozen group of recipe keys; unknown keys are errors. Each field's docstring is its help text, one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def select_section(cls, values: Mapping[str, Any]) -> type[Self]:
        """Return the class that validates ``values``: this one, unless a key other than ``kind`` selects another."""
        return cls


def find_section_class(annotation: object) -> type[ConfigSection] | None:
    """Return the section class of a field, which may be optional, or have another form without keys; None for none."""
    if get_origin(annotation) in {Annotated, Union, UnionType}:
        arguments = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
        sections = [section for section in map(find_section_class, arguments) if section is not None]
        return sections[0] if len(sections) == 1 else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, ConfigSection) else None


class RecordModel(BaseModel):
    """A frozen part of a record; unknown fields are errors."""

    # JSON has no NaN or infinity. Written as null they could not be read back into a number field.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
