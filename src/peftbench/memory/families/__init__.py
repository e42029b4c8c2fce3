"""Model families with their published configs, available without the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
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
    aliases: tuple[str, ...] = ()
    """Further names on the Hub of models with the same config."""
    parameters: int
    """Number of parameters that transformers builds from the config; a tied head is counted once."""
    published: str
    """Published number of parameters: exact ("124439808") or rounded ("6.7B")."""
    published_source: str
    """Source of the published number: a file, or what to search for in public code to find files that quote it."""
    config: dict[str, Any]
    """Keys of its config.json in which the members differ."""
    source: str
    """Source of the config: a public file, or what to search for to find one."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the name and the aliases."""
        return (self.name, *self.aliases)


class Family(BaseModel):
    """Models of one architecture, smallest first; of models with equal parameters, the preferred one is last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: dict[str, Any]
    """Config keys that all members share."""
    members: tuple[FamilyMember, ...]

    def merge_config(self, member: FamilyMember) -> dict[str, Any]:
        """Return a copy of the whole config of ``member``; transformers changes the dictionaries that it is given."""
        return deepcopy(self.config | member.config)


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


def find_member(name: str) -> tuple[Family, FamilyMember] | None:
    """Find a model by its name or an alias, with or without the owner, in any case.

    The result is None for an unknown name, and for a name without an owner that several models have.
    """
    wanted = name.casefold()
    matches = [
        pair
        for pair in _iter_members()
        if any(wanted in (known.casefold(), known.casefold().rpartition("/")[2]) for known in pair[1].names)
    ]
    return matches[0] if len(matches) == 1 else None


def list_model_names() -> list[str]:
    """Return the names and aliases of all models, by family."""
    return [name for _, member in _iter_members() for name in member.names]


@contextmanager
def with_bundled_config(model: Model) -> Iterator[Model]:
    """Point a model of a family to a temporary folder with its config; yield any other model unchanged.

    This avoids a download, since configs of published models do not change. The path must be the exact name on the
    Hub, which a run accepts too. A model with a revision is unchanged.
    """
    match = next((pair for pair in _iter_members() if model.path in pair[1].names), None)
    if match is None or model.revision is not None or Path(model.path).exists():
        yield model
        return
    family, member = match
    with TemporaryDirectory(prefix="peftbench-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(family.merge_config(member)), encoding="utf-8")
        yield model.model_copy(update={"path": folder})


def _iter_members() -> Iterator[tuple[Family, FamilyMember]]:
    for family in load_families().values():
        for member in family.members:
            yield family, member
