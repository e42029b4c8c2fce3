"""Text that OmegaConf reads literally."""

from __future__ import annotations

import re

INTERPOLATION_PREFIX = "${"
_INTERPOLATION_PATTERN = re.compile(r"(\\*)\$\{")


def escape_interpolation(text: str) -> str:
    r"""Return ``text`` with OmegaConf's interpolations escaped; each ``\`` before one is doubled to stay literal."""
    return _INTERPOLATION_PATTERN.sub(r"\1\1\\${", text)
