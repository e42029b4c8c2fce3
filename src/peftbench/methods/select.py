"""Selective tuning: trains the base model's own parameters whose names match a regular expression.

No learning rate fits every selection. For matrices, start with a rate of full fine-tuning, e.g. 1e-5 to 5e-4; for
vectors (biases, normalizations), with 1e-4 to 1e-3 (see :mod:`peftbench.methods.select_presets`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from pydantic import field_validator

from peftbench.errors import TargetModulesError, did_you_mean
from peftbench.methods.selection import ParameterSelection, list_named_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Select(ParameterSelection):
    """Train the base model's parameters whose names match."""

    kind: Literal["select"] = "select"
    """Kind of method."""
    train: str
    """Regular expression for the full names of parameters (re.fullmatch, as in target_modules), e.g. .*norm.*"""
    untie_head: bool = False
    """Give the head its own copy of a matrix that it shares with the embedding; each name then selects only one."""

    @field_validator("train")
    @classmethod
    def _check_train(cls, value: str) -> str:
        if not value:
            raise ValueError("must match at least one parameter's name, e.g. .*bias")
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"invalid regular expression ({error})") from error
        return value

    @property
    def has_separate_head(self) -> bool:
        return self.untie_head

    def select_names(self, base: PreTrainedModel) -> list[str]:
        names = [name for name, _ in list_named_parameters(base)]
        if selected := [name for name in names if re.fullmatch(self.train, name)]:
            return selected
        is_part = any(re.search(self.train, name) for name in names)
        hint = f"write .*({self.train}).* to match a part" if is_part else did_you_mean(self.train, _shorten(names))
        raise TargetModulesError(
            f"method.train {self.train!r} matches no full name of a parameter (architecture {base.config.model_type}); "
            f"{hint}"
        )


def _shorten(names: list[str]) -> list[str]:
    """Return one name, the first, of those that differ only in numbers, e.g. in the number of the block."""
    shortened: dict[str, str] = {}
    for name in names:
        shortened.setdefault(re.sub(r"\.\d+(?=\.)", "", name), name)
    return list(shortened.values())
