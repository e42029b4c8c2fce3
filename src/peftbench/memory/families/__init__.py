"""Model families with their published configs, available without the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from peftbench.common.filesystem import load_json_resources
from peftbench.errors import BudgetError, did_you_mean

if TYPE_CHECKING:
    from peftbench.recipe.schema import Model


class FamilyMember(BaseModel):
    """One model of a family."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """The model's name on the Hub."""
    parameters: int
    """Published number of parameters; a tied head is counted once."""
    config: dict[str, Any]
    """Keys of its config.json in which the members differ."""


class Family(BaseModel):
    """Models of one architecture, smallest first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: dict[str, Any]
    """Config keys that all members share."""
    members: tuple[FamilyMember, ...]


@cache
def load_families() -> dict[str, Family]:
    """Return all families by file name."""
    return load_json_resources(__package__, Family)


def get_family(name: str) -> Family:
    """Return the family called ``name``.

    Raises:
        BudgetError: there is no such family; the message suggests the nearest name.
    """
    if name not in load_families():
        raise BudgetError(f"Unknown model family {name!r}", did_you_mean(name, load_families()))
    return load_families()[name]


@contextmanager
def with_bundled_config(model: Model) -> Iterator[Model]:
    """Point a model of a family to a temporary folder with its config; yield any other model unchanged.

    This avoids a download, since configs of published models do not change. A model with a revision is unchanged.
    """
    match = next((pair for pair in _iter_members() if pair[1].name == model.path), None)
    if match is None or model.revision is not None or Path(model.path).exists():
        yield model
        return
    family, member = match
    with TemporaryDirectory(prefix="peftbench-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(family.config | member.config), encoding="utf-8")
        yield model.model_copy(update={"path": folder})


def _iter_members() -> Iterator[tuple[Family, FamilyMember]]:
    for family in load_families().values():
        for member in family.members:
            yield family, member
