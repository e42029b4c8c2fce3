"""The kind of thing a recipe is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigSection(BaseModel):
    """A frozen group of knobs that knows no key but its own. Each field's description is its one-line meaning."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class RecordModel(BaseModel):
    """A part of a record: frozen, of known fields alone."""

    # JSON has no NaN or infinity; as null they could not be read back where a number must be.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
