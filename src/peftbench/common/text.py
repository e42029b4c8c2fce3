"""Texts that OmegaConf shall read as they are."""

from __future__ import annotations

import re

INTERPOLATION_PREFIX = "${"
_INTERPOLATION_PATTERN = re.compile(r"(\\*)\$\{")


def escape_interpolation(text: str) -> str:
    r"""``text`` with OmegaConf's interpolations escaped: of ``\`` before one, each stands for itself only doubled."""
    return _INTERPOLATION_PATTERN.sub(r"\1\1\\${", text)
