"""Facts that come with peftbench, one JSON file each, by the file's name."""

from __future__ import annotations

from importlib import resources
from typing import TypeVar

from pydantic import BaseModel

ResourceT = TypeVar("Facts", bound=BaseModel)


def load_json_resources(package: str, kind: type[ResourceT]) -> dict[str, ResourceT]:
    """Every file of ``package``, by its name without the ending, in order."""
    files = (path for path in resources.files(package).iterdir() if path.name.endswith(".json"))
    found = {path.name.removesuffix(".json"): kind.model_validate_json(path.read_bytes()) for path in files}
    return dict(sorted(found.items()))
