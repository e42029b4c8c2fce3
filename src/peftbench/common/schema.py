"""Base classes of recipe sections and of records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self, get_args

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
    """Return the section class of a field, which may be optional; None if the field holds a plain value."""
    classes = [one for one in get_args(annotation) or (annotation,) if one is not type(None)]
    is_group = len(classes) == 1 and isinstance(classes[0], type) and issubclass(classes[0], ConfigSection)
    return classes[0] if is_group else None


class RecordModel(BaseModel):
    """A frozen part of a record; unknown fields are errors."""

    # JSON has no NaN or infinity. Written as null they could not be read back into a number field.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
