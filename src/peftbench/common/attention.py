"""The name under which transformers knows the package's attention, for modules that may not import its code."""

from __future__ import annotations

ATTENTION_NAME = "peftbench_causal"
"""A config's ``_attn_implementation`` in training. transformers builds no mask for a name without mask functions."""
