"""Methods of peft that put trained vectors in front of a sequence or of its keys and values."""

from __future__ import annotations

from typing import ClassVar

from peftbench.methods.peft_method import PeftMethod


class PeftPrompt(PeftMethod):
    """Base class of sections of types that learn a prompt."""

    merges_into_base: ClassVar[bool] = False
