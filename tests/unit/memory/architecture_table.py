"""Print docs/reference/architectures.md: run and plan every tiny architecture with every method (about 15 minutes).

Usage: ``python -m tests.unit.memory.architecture_table > docs/reference/architectures.md``
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peftbench import shipped
from peftbench.data.sources import Files
from tests.helpers.architecture_plans import CASES, EXACT, METHODS, compare_run_and_plan, write_tiny_config
from tests.helpers.corpus import write_equal_labels
from tests.helpers.workshop import Workshop

INTRODUCTION = """# Plans of architectures

Each row is a tiny model (two layers, random weights) of an architecture of transformers. For each method, a run takes
three steps on CPU, and `estimate`'s simulation plans the same step:

- **exact**: the plan's live bytes equal those of the run.
- **not planned**: the run trains, and `estimate` refuses with exit code 82 and the name of the module that needs
  values.
- **refused**: the run and the plan are refused in the same sentence.

The table is made by `python -m tests.unit.memory.architecture_table`, and `make test-slow` checks every cell.

"""


def print_table(folder: Path, tokenizer: PreTrainedTokenizerBase, source: Files) -> None:
    """Print the page; reasons follow the table, each once."""
    reasons: dict[str, str] = {}
    lines = [f"| architecture | {' | '.join(METHODS)} |", "| --- |" + " --- |" * len(METHODS)]
    for number, case in enumerate(tqdm(CASES, unit="architecture")):
        base = write_tiny_config(case, folder / str(number), tokenizer)
        workshop = Workshop(lambda _, base=base: base, source, folder / "out")  # type: ignore[misc]
        cells = []
        for method in METHODS:
            outcome, reason = compare_run_and_plan(workshop, source, base, method)
            cells.append(outcome)
            if outcome != EXACT:
                reasons[f"{case} ({method})"] = reason
        lines.append(f"| {case} | {' | '.join(cells)} |")
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    sys.stdout.write(INTRODUCTION + "\n".join(lines) + "\n\n## Reasons\n\n")
    for reason, names in by_reason.items():
        sys.stdout.write(f"- {', '.join(names)}: {reason}\n")


def main() -> None:
    """Print the page."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    tokenizer = AutoTokenizer.from_pretrained(shipped.SHIPPED_MODEL_DIR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print_table(folder, tokenizer, write_equal_labels(folder / "corpus"))


if __name__ == "__main__":
    main()
