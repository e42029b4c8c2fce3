"""Families of models, by the numbers that their published configs differ in: what is known without a hub."""

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
    """On the hub."""
    parameters: int
    """As published; a tied head is counted once."""
    config: dict[str, Any]
    """As its config.json has them."""


class Family(BaseModel):
    """Models of one architecture, the smallest first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: dict[str, Any]
    """What all have in common."""
    members: tuple[FamilyMember, ...]


@cache
def load_families() -> dict[str, Family]:
    """All that have a file, by its name."""
    return load_json_resources(__package__, Family)


def get_family(name: str) -> Family:
    """The family of that name.

    Raises:
        BudgetError: there is no file for it; names the nearest.
    """
    if name not in load_families():
        raise BudgetError(f"no family of models is called {name!r} here", did_you_mean(name, load_families()))
    return load_families()[name]


@contextmanager
def with_bundled_config(model: Model) -> Iterator[Model]:
    """``model`` from a folder with its config, where it is one of a family; any other as it is.

    No hub is asked, unless a revision is: configs of published models do not change.
    """
    found = next((pair for pair in _iter_members() if pair[1].name == model.path), None)
    if found is None or model.revision is not None or Path(model.path).exists():
        yield model
        return
    family, member = found
    with TemporaryDirectory(prefix="peftbench-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(family.config | member.config), encoding="utf-8")
        yield model.model_copy(update={"path": folder})


def _iter_members() -> Iterator[tuple[Family, FamilyMember]]:
    for family in load_families().values():
        for member in family.members:
            yield family, member
