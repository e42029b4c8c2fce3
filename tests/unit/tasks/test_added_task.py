"""The task in docs/guides/tasks.md: one file and one row make it usable everywhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peftbench

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "tasks.md"
ROW_BEFORE = '    "summarization": Summarization,\n'


def test_task_of_the_guide_is_found_by_its_columns(tmp_path: Path) -> None:
    """A copy of the package with the guide's file and row finds the task and shows its example."""
    file, row = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    package = tmp_path / "peftbench"
    shutil.copytree(Path(peftbench.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "tasks" / "translation.py").write_text(file, encoding="utf-8")
    registry = package / "tasks" / "__init__.py"
    text = registry.read_text(encoding="utf-8")
    assert ROW_BEFORE in text
    text = text.replace(ROW_BEFORE, ROW_BEFORE + row).replace(
        "from peftbench.tasks.text", "from peftbench.tasks.translation import Translation\nfrom peftbench.tasks.text"
    )
    registry.write_text(text, encoding="utf-8")
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"source": "good morning", "target": "bon matin"}) + "\n", encoding="utf-8")

    arguments = ["name=x", "method.kind=full", "train.steps=1", "data.source.kind=files", f"data.source.train={data}"]
    shown = subprocess.run(
        [sys.executable, "-m", "peftbench", "data", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert shown.returncode == 0, shown.stderr
    assert "task.kind is translation (columns source, target)" in shown.stdout
    assert "Translate: good morning\n⟦bon matin" in shown.stdout
