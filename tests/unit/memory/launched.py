"""Run recipes one after another in the processes of one launch: ``launched.py RECIPE.json...``."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch
from accelerate.state import PartialState

from peftbench.recipe.schema import Recipe
from peftbench.run.runner import Run
from tests.distributed.battery import run_fresh_process


def main() -> None:
    """Run the recipes given on the command line."""
    torch.set_num_threads(1)
    # A run destroys the process group at its end; the next run here needs it.
    PartialState.destroy_process_group = lambda *_: None  # type: ignore[assignment,method-assign]
    for name in sys.argv[1:]:
        run_fresh_process()
        try:
            Run(Recipe.model_validate_json(Path(name).read_text(encoding="utf-8"))).execute()
        except Exception:  # run the other recipes
            traceback.print_exc()


if __name__ == "__main__":
    main()
