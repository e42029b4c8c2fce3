"""The base that comes with the package: a small GPT-2 that needs no hub. ``pretrain.py`` is how it was made."""

from __future__ import annotations

from pathlib import Path

SHIPPED_MODEL = "shipped"
"""What a recipe writes as ``model.path`` to start from this base."""

SHIPPED_MODEL_DIR = Path(__file__).parent / "tiny_gpt2"
