"""Path of the repository."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RECORD_V1 = REPOSITORY / "tests" / "unit" / "record" / "record_v1.json"
RECORD_V2 = REPOSITORY / "tests" / "unit" / "record" / "record_v2.json"
"""A record of schema 1."""
