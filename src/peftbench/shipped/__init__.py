"""The base model shipped with the package: a small GPT-2 that works offline; ``pretrain.py`` trains it."""

from __future__ import annotations

from pathlib import Path

SHIPPED_MODEL = "shipped"
"""Value of ``model.path`` that selects this base model."""

SHIPPED_MODEL_DIR = Path(__file__).parent / "tiny_gpt2"
