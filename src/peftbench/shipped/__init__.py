"""Shipped with the package: a small GPT-2 that works offline (``pretrain.py`` trains it), and a general text."""

from __future__ import annotations

from pathlib import Path

SHIPPED_MODEL = "shipped"
"""Value of ``model.path`` that selects this base model."""

SHIPPED_MODEL_DIR = Path(__file__).parent / "tiny_gpt2"

SHIPPED_GENERAL_TEXT = "shipped"
"""Value of ``evaluate.general_text`` that selects this text."""

GENERAL_TEXT_FILE = Path(__file__).parent / "general_text.txt"
"""Plain English on several subjects, written for peftbench and dedicated to the public domain (CC0 1.0)."""
