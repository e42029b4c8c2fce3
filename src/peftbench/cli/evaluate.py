"""The command ``evaluate``: evaluate the saved model of a run, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from peftbench.common.options import OverridesArgument


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run with a saved model.")],
    overrides: OverridesArgument = None,
    from_outputs: Annotated[
        bool,
        typer.Option(
            "--from-outputs",
            metavar="",
            help="Compute the metrics again from the run's outputs (outputs.jsonl), without the model.",
        ),
    ] = False,
    metric: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="NAME",
            help="With --from-outputs: compute this metric and add it to the record, or replace it there. Repeatable. "
            "Default: the recipe's metrics.",
        ),
    ] = None,
) -> None:
    """Evaluate the saved model of a run, without training, and update its record.

    Overrides may change keys of the evaluation, e.g. evaluate.batch_size=1.
    """
    from peftbench.run.shutdown import ignore_signals
    from peftbench.train import evaluate_from_arguments

    try:
        evaluate_from_arguments(run, overrides or [], from_outputs=from_outputs, metrics=metric or [])
    finally:
        ignore_signals()
