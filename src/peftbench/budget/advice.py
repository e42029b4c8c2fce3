"""What a run that ran out of memory would have needed, and what would have fitted: asked of the estimator.

It answers in a process of its own (``python -m peftbench.budget.advice``), for the one that asks is short of memory,
and may be one of several that are bound to each other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from peftbench.budget.devices import device_named, of_torch_name
from peftbench.errors import BudgetError, PeftbenchError
from peftbench.recipe import Recipe

if TYPE_CHECKING:
    from peftbench.budget.plan import Strategy

_SECONDS = 300
_LAUNCHER = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
             "GROUP_", "ROLE_", "DEEPSPEED_")  # fmt: skip


class Question(BaseModel):
    """A recipe, the bytes that it may take, and the device by torch's name for it."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    budget_bytes: int
    device: str


class Advice(BaseModel):
    """The estimator's answer."""

    model_config = ConfigDict(frozen=True)

    needed_bytes: int | None = None
    """What the recipe's process is predicted to hold, at least."""
    suggestion: str | None = None
    problem: str | None = None
    """Why there is no answer."""


def ask(question: Question) -> Advice:
    """Ask, and wait for the answer for some minutes at most; it never raises, for what asks has a record to write."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(
            command, input=question.model_dump_json(), capture_output=True, text=True, timeout=_SECONDS, check=False,
            env=environment,
        )  # fmt: skip
        return Advice.model_validate_json(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, IndexError, ValidationError) as error:
        return Advice(problem=f"the estimator gave no answer ({type(error).__name__})")


def answer(question: Question) -> Advice:
    """What the recipe needs, and the fastest change that is predicted to fit; one that trades nothing, if there is."""
    from peftbench.budget.estimate import estimate
    from peftbench.budget.search import TECHNIQUES, Room, strategies

    recipe, budget = question.recipe, question.budget_bytes
    facts = device_named("cpu") if question.device == "cpu" else of_torch_name(question.device)
    try:
        needed = estimate(recipe, facts, question.device).process_bytes[0]
    except PeftbenchError as error:
        return Advice(problem=str(error))
    free = ",".join(technique.name for technique in TECHNIQUES if technique.trades is None)
    for allowed in (free, "all"):
        try:
            fitting = strategies(recipe, allowed, Room(facts, question.device, budget))
        except BudgetError as error:  # not even the weights have room
            return Advice(needed_bytes=needed, suggestion=f"nothing that was tried would fit: {error}")
        if fitting:
            return Advice(needed_bytes=needed, suggestion=_suggested(fitting[0]))
    return Advice(needed_bytes=needed, suggestion="no smaller micro-batch and no technique of peftbench fit would fit")


def _suggested(strategy: Strategy) -> str:
    trades = f", which trades {'; '.join(strategy.trades)}" if strategy.trades else ""
    most = strategy.plan.process_bytes[1] / 2**20
    return f"{' '.join(strategy.changes)} is predicted to fit, with {most:,.0f} MiB at most{trades}"


def main() -> None:
    """Answer the question on standard input."""
    from peftbench.console import quiet_libraries  # which a run that asks need not be able to import

    question = Question.model_validate_json(sys.stdin.read())
    quiet_libraries()
    print(answer(question).model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
