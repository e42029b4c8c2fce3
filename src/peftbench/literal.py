"""Texts that OmegaConf shall read as they are."""

from __future__ import annotations

import re

INTERPOLATION = "${"
_OPENS = re.compile(r"(\\*)\$\{")


def literal(text: str) -> str:
    r"""``text`` with OmegaConf's interpolations escaped: of ``\`` before one, each stands for itself only doubled."""
    return _OPENS.sub(r"\1\1\\${", text)
