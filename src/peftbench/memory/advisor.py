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

from peftbench.errors import BudgetTooSmallError, PeftbenchError
from peftbench.memory.devices import get_device_facts, get_facts_by_torch_name
from peftbench.memory.launch_config import build_launch_config, select_launcher_env
from peftbench.memory.search import TECHNIQUES, MemoryTarget, choose_micro_batch, strategies, with_micro_batch
from peftbench.recipe.schema import Recipe

if TYPE_CHECKING:
    from peftbench.memory.plan import Strategy

_TIMEOUT_SECONDS = 300
_STRIPPED_ENV_PREFIXES = (
    "ACCELERATE_",
    "FSDP_",
    "TORCHELASTIC_",
    "MASTER_",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_",
    "ROLE_",
    "DEEPSPEED_",
)


class AdviceRequest(BaseModel):
    """A recipe, the bytes that each of its processes may take, and where it runs."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    budget_bytes: int
    device_name: str
    """By torch's name for it, or cpu."""
    num_processes: int = 1
    launcher_env: dict[str, str] = {}
    """What each process was told by its launcher."""

    @classmethod
    def from_environment(cls, recipe: Recipe, budget_bytes: int, device_name: str) -> AdviceRequest:
        """With the launcher that started this process."""
        return cls(
            recipe=recipe,
            budget_bytes=budget_bytes,
            device_name=device_name,
            launcher_env=select_launcher_env(os.environ),
            num_processes=int(os.environ.get("WORLD_SIZE", "1")),
        )

    def build_target(self) -> MemoryTarget:
        """What is to be fitted."""
        facts = get_device_facts("cpu") if self.device_name == "cpu" else get_facts_by_torch_name(self.device_name)
        world = build_launch_config(self.num_processes, self.launcher_env, with_micro_batch(self.recipe, 1))
        return MemoryTarget(facts, self.device_name, self.budget_bytes, world)


class Advice(BaseModel):
    """The estimator's answer."""

    model_config = ConfigDict(frozen=True)

    estimated_peak_bytes: int | None = None
    """What the recipe's process is predicted to hold, at least."""
    suggestion: str | None = None
    error: str | None = None
    """Why there is no answer."""


class MicroBatchChoice(BaseModel):
    """What ``train.micro_batch_size=auto`` becomes."""

    model_config = ConfigDict(frozen=True)

    micro_batch_size: int = 1
    evaluation_batch_size: int = 1
    note: str | None = None
    error: str | None = None


def request_advice(request: AdviceRequest) -> Advice:
    """Ask what would have fitted, and wait some minutes for it at most; what asks has a record to write."""
    said, problem = _run_advisor(request, "advice")
    try:
        return Advice.model_validate_json(said)
    except ValidationError:
        return Advice(problem=problem)


def request_micro_batch(request: AdviceRequest) -> MicroBatchChoice:
    """Ask what ``train.micro_batch_size=auto`` becomes."""
    said, problem = _run_advisor(request, "settle")
    try:
        return MicroBatchChoice.model_validate_json(said)
    except ValidationError:
        return MicroBatchChoice(problem=f"{problem}; set train.micro_batch_size to a number")


def _run_advisor(request: AdviceRequest, request_kind: str) -> tuple[str, str]:
    """The last line of an estimator in a process of its own, and why there may be none."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_STRIPPED_ENV_PREFIXES)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, request_kind],
            input=request.model_dump_json(),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
            env=environment,
        )
    except OSError as error:
        return "", f"the estimator could not be started: {error}"
    except subprocess.TimeoutExpired as late:  # what it has said by then is what the recipe needs
        said = late.stdout or b""
        return _get_last_line(
            said if isinstance(said, str) else said.decode()
        ), f"the estimator took over {_TIMEOUT_SECONDS} seconds"
    return _get_last_line(
        done.stdout
    ), f"the estimator gave no answer: {_get_last_line(done.stderr) or done.returncode}"


def _get_last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def advise(request: AdviceRequest) -> Advice:
    """What the recipe needs, and the fastest change that is predicted to fit; one that trades nothing, if there is."""
    from peftbench.memory.estimate import estimate

    recipe = request.recipe
    try:
        room = request.build_target()
        needed = estimate(recipe, room.facts, room.device_name, launch_config=room.launch_config).process_bytes[0]
    except PeftbenchError as error:
        return Advice(problem=str(error))
    print(Advice(needed_bytes=needed).model_dump_json(), flush=True)  # should the search take too long
    free = ",".join(technique.name for technique in TECHNIQUES if technique.tradeoff is None)
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


def build_micro_batch_choice(request: AdviceRequest) -> MicroBatchChoice:
    """What ``train.micro_batch_size=auto`` becomes, or why it cannot be said."""
    try:
        recipe, note = choose_micro_batch(request.recipe, request.build_target())
    except PeftbenchError as error:
        return MicroBatchChoice(problem=str(error))
    return MicroBatchChoice(
        micro_batch=recipe.train.resolved_micro_batch_size or 1, evaluation_batch=recipe.evaluate.batch_size, note=note
    )


def _format_suggestion(strategy: Strategy) -> str:
    trades = f", which trades {'; '.join(strategy.tradeoffs)}" if strategy.tradeoffs else ""
    most = strategy.plan.process_bytes[1] / 2**20
    return f"{' '.join(strategy.overrides)} is predicted to fit, with {most:,.0f} MiB at most{trades}"


def main() -> None:
    """Answer the question on standard input: what would fit ("advice"), or what auto becomes ("settle")."""
    from peftbench.common.libraries import quiet_libraries  # which a run that asks need not be able to import

    question = AdviceRequest.model_validate_json(sys.stdin.read())
    quiet_libraries()
    said: BaseModel = build_micro_batch_choice(question) if sys.argv[1] == "settle" else advise(question)
    print(said.model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
