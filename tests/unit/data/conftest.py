"""Fixtures for data: a separate cache for each test, and files of examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

Rows = Sequence[dict[str, Any]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test its own empty caches, for peftbench and for ``datasets``; return their folder."""
    import datasets

    monkeypatch.setenv("PEFTBENCH_CACHE", str(tmp_path / "cache" / "peftbench"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    return tmp_path / "cache"


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, Rows], str]:
    """Return a function that writes rows to a file, in the format of its suffix, and returns the path."""

    def write(name: str, rows: Rows) -> str:
        import pandas as pd

        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        elif path.suffix == ".csv":
            pd.DataFrame(rows).to_csv(path, index=False)
        else:
            pd.DataFrame(rows).to_parquet(path)
        return str(path)

    return write
