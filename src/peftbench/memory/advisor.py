"""What a run that ran out of memory would have needed, and what would have fitted: asked of the estimator.

It answers in a process of its own (``python -m peftbench.memory.advisor``), for the one that asks is short of memory,
and may be one of several that are bound to each other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from peftbench.memory.devices import get_device_facts, get_facts_by_torch_name
from peftbench.memory.search import TECHNIQUES, MemoryTarget, choose_micro_batch, strategies, with_micro_batch
from peftbench.memory.launch_config import select_launcher_env, build_launch_config
from peftbench.errors import BudgetTooSmallError, PeftbenchError
from peftbench.recipe.schema import Recipe

if TYPE_CHECKING:
    from peftbench.memory.plan import Strategy

_TIMEOUT_SECONDS = 300
_STRIPPED_ENV_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
             "GROUP_", "ROLE_", "DEEPSPEED_")  # fmt: skip


class AdviceRequest(BaseModel):
    """A recipe, the bytes that each of its processes may take, and where it runs."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    budget_bytes: int
    device: str
    """By torch's name for it, or cpu."""
    processes: int = 1
    launcher: dict[str, str] = {}
    """What each process was told by its launcher."""

    @classmethod
    def here(cls, recipe: Recipe, budget_bytes: int, device: str) -> AdviceRequest:
        """With the launcher that started this process."""
        return cls(
            recipe=recipe, budget_bytes=budget_bytes, device=device, launcher=select_launcher_env(os.environ),
            processes=int(os.environ.get("WORLD_SIZE", "1")),
        )  # fmt: skip

    def room(self) -> MemoryTarget:
        """What is to be fitted."""
        facts = get_device_facts("cpu") if self.device == "cpu" else get_facts_by_torch_name(self.device)
        world = build_launch_config(self.processes, self.launcher, with_micro_batch(self.recipe, 1))
        return MemoryTarget(facts, self.device, self.budget_bytes, world)


class Advice(BaseModel):
    """The estimator's answer."""

    model_config = ConfigDict(frozen=True)

    needed_bytes: int | None = None
    """What the recipe's process is predicted to hold, at least."""
    suggestion: str | None = None
    problem: str | None = None
    """Why there is no answer."""


class MicroBatchChoice(BaseModel):
    """What ``train.micro_batch_size=auto`` becomes."""

    model_config = ConfigDict(frozen=True)

    micro_batch: int = 1
    evaluation_batch: int = 1
    note: str | None = None
    problem: str | None = None


def request_advice(question: AdviceRequest) -> Advice:
    """Ask what would have fitted, and wait some minutes for it at most; what asks has a record to write."""
    said, problem = _run_advisor(question, "advice")
    try:
        return Advice.model_validate_json(said)
    except ValidationError:
        return Advice(problem=problem)


def request_micro_batch(question: AdviceRequest) -> MicroBatchChoice:
    """Ask what ``train.micro_batch_size=auto`` becomes."""
    said, problem = _run_advisor(question, "settle")
    try:
        return MicroBatchChoice.model_validate_json(said)
    except ValidationError:
        return MicroBatchChoice(problem=f"{problem}; set train.micro_batch_size to a number")


def _run_advisor(question: AdviceRequest, what: str) -> tuple[str, str]:
    """The last line of an estimator in a process of its own, and why there may be none."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_STRIPPED_ENV_PREFIXES)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, what], input=question.model_dump_json(), capture_output=True, text=True,
            timeout=_TIMEOUT_SECONDS, check=False, env=environment,
        )  # fmt: skip
    except OSError as error:
        return "", f"the estimator could not be started: {error}"
    except subprocess.TimeoutExpired as late:  # what it has said by then is what the recipe needs
        said = late.stdout or b""
        return _get_last_line(said if isinstance(said, str) else said.decode()), f"the estimator took over {_TIMEOUT_SECONDS} seconds"
    return _get_last_line(done.stdout), f"the estimator gave no answer: {_get_last_line(done.stderr) or done.returncode}"


def _get_last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def advise(question: AdviceRequest) -> Advice:
    """What the recipe needs, and the fastest change that is predicted to fit; one that trades nothing, if there is."""
    from peftbench.memory.estimate import estimate

    recipe = question.recipe
    try:
        room = question.room()
        needed = estimate(recipe, room.facts, room.device, world=room.world).process_bytes[0]
    except PeftbenchError as error:
        return Advice(problem=str(error))
    print(Advice(needed_bytes=needed).model_dump_json(), flush=True)  # should the search take too long
    free = ",".join(technique.name for technique in TECHNIQUES if technique.trades is None)
    for allowed in (free, "all"):
        try:
            fitting = strategies(recipe, allowed, room)
        except BudgetTooSmallError as error:
            return Advice(needed_bytes=needed, suggestion=f"nothing that was tried would fit: {error}")
        except PeftbenchError as error:
            return Advice(needed_bytes=needed, problem=str(error))
        if fitting:
            return Advice(needed_bytes=needed, suggestion=_format_suggestion(fitting[0]))
    return Advice(needed_bytes=needed, suggestion="no smaller micro-batch and no technique of peftbench fit would fit")


def build_micro_batch_choice(question: AdviceRequest) -> MicroBatchChoice:
    """What ``train.micro_batch_size=auto`` becomes, or why it cannot be said."""
    try:
        recipe, note = choose_micro_batch(question.recipe, question.room())
    except PeftbenchError as error:
        return MicroBatchChoice(problem=str(error))
    return MicroBatchChoice(micro_batch=recipe.train.rows or 1, evaluation_batch=recipe.evaluate.batch_size, note=note)


def _format_suggestion(strategy: Strategy) -> str:
    trades = f", which trades {'; '.join(strategy.trades)}" if strategy.trades else ""
    most = strategy.plan.process_bytes[1] / 2**20
    return f"{' '.join(strategy.changes)} is predicted to fit, with {most:,.0f} MiB at most{trades}"


def main() -> None:
    """Answer the question on standard input: what would fit ("advice"), or what auto becomes ("settle")."""
    from peftbench.common.console import quiet_libraries  # which a run that asks need not be able to import

    question = AdviceRequest.model_validate_json(sys.stdin.read())
    quiet_libraries()
    said: BaseModel = build_micro_batch_choice(question) if sys.argv[1] == "settle" else advise(question)
    print(said.model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
