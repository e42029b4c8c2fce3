"""Print docs/reference/architectures.md: run and plan every tiny architecture with every method (about 15 minutes).

Usage: ``make architectures``
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peftbench import shipped
from peftbench.data.sources import Files
from tests.helpers.architecture_plans import CASES, EXACT, METHODS, compare_run_and_plan, write_tiny_config
from tests.helpers.corpus import write_corpus_with_equal_summaries
from tests.helpers.workshop import Workshop

INTRODUCTION = """# Memory plans by architecture

Each row is a tiny model (two layers, random weights) of an architecture of transformers. A run trains three steps on
CPU, and the simulation of `estimate` plans the third:

- **exact**: the peak of live bytes in the plan equals that of the run, within 64 bytes.
- **not planned**: the run trains, and `estimate` ends with exit code 82 and the name of the module that reads tensor
  values.
- **refused**: the run and the plan end with the same error message.

Encoders (BERT and its relatives) run with `is_decoder=True`; without it they are refused.

The table is made by `make architectures`, and `make test-slow` checks every cell.

"""


def print_table(folder: Path, tokenizer: PreTrainedTokenizerBase, source: Files) -> None:
    """Print the page; reasons follow the table, each once."""
    cases_by_reason: dict[str, list[str]] = {}
    lines = [f"| architecture | {' | '.join(METHODS)} |", "| --- |" + " --- |" * len(METHODS)]
    for number, case in enumerate(tqdm(CASES, unit="architecture")):
        base = write_tiny_config(case, folder / str(number), tokenizer)
        workshop = Workshop(lambda _, base=base: base, source, folder / "out")  # type: ignore[misc]
        cells = []
        for method in METHODS:
            outcome, reason = compare_run_and_plan(workshop, source, base, METHODS[method])
            cells.append(outcome)
            if outcome != EXACT:
                _add_case(cases_by_reason, case, reason)
        lines.append(f"| {case} | {' | '.join(cells)} |")
    sys.stdout.write(INTRODUCTION + "\n".join(lines) + "\n\n## Reasons\n\nMODEL_TYPE stands for the architecture.\n\n")
    for reason, cases in cases_by_reason.items():
        sys.stdout.write(f"- {reason}\n  {'; '.join(cases)}\n")


def _add_case(cases_by_reason: dict[str, list[str]], case: str, reason: str) -> None:
    """Add a case to those with the same reason, in which MODEL_TYPE replaces the model's type."""
    model_type = re.escape(case.split(",", maxsplit=1)[0])
    reason = re.sub(rf"(?<![\w-])'?{model_type}'?(?![\w-])", "MODEL_TYPE", reason)
    cases = cases_by_reason.setdefault(f"`{reason}`", [])
    if case not in cases:
        cases.append(case)


def main() -> None:
    """Print the page."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    tokenizer = AutoTokenizer.from_pretrained(shipped.SHIPPED_MODEL_DIR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print_table(folder, tokenizer, write_corpus_with_equal_summaries(folder / "corpus"))


if __name__ == "__main__":
    main()
