"""What every part of a record has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class RecordModel(BaseModel):
    """A part of a record: frozen, of known fields alone."""

    # JSON has no NaN or infinity; as null they could not be read back where a number must be.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
