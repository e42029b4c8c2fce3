"""Estimate what a run that ran out of memory needs, and suggest a change that fits.

The estimator runs in a subprocess (``python -m peftbench.memory.advisor``): the calling process is short of memory and
may belong to a distributed process group.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from peftbench.distributed.launcher_env import get_world_size, select_launcher_env, without_launcher_env
from peftbench.errors import PeftbenchError
from peftbench.memory.devices import get_device_facts, get_facts_by_torch_name
from peftbench.memory.label_counts import LabelCount, with_label_count
from peftbench.memory.launch_config import build_launch_config
from peftbench.memory.plan import Plan, UnplannedRun
from peftbench.memory.search import MemoryTarget, choose_micro_batch, plan_run, with_micro_batch
from peftbench.memory.suggestion import EVALUATION_PHASES, suggest_change, suggest_evaluation
from peftbench.recipe.schema import Recipe

_TIMEOUT_SECONDS = 300
_PLAN_ANSWER: TypeAdapter[Plan | UnplannedRun] = TypeAdapter(Plan | UnplannedRun)


class AdviceRequest(BaseModel):
    """A recipe, the budget of each process, and the device and launcher that it runs with."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    budget_bytes: int | None
    """None if only the needed memory is asked for."""
    device_name: str
    """torch's name of the device, or cpu."""
    compute_capability: tuple[int, int] | None = None
    """CUDA compute capability, which selects attention kernels; None on CPU."""
    num_processes: int = 1
    phase: str | None = None
    """Phase that ran out of memory, None if none did."""
    launcher_env: dict[str, str] = {}
    """Environment variables that the launcher set in each process."""
    labeled_tokens: int | None = None
    """Labeled tokens of a row in a plan; None: as the task or the data have them."""

    @classmethod
    def from_environment(
        cls,
        recipe: Recipe,
        budget_bytes: int | None,
        device_name: str,
        phase: str | None = None,
        labeled_tokens: int | None = None,
    ) -> AdviceRequest:
        """Build a request with the launcher and the device of this process."""
        import torch

        return cls(
            recipe=recipe,
            budget_bytes=budget_bytes,
            device_name=device_name,
            phase=phase,
            labeled_tokens=labeled_tokens,
            compute_capability=None if device_name == "cpu" else torch.cuda.get_device_capability(),
            launcher_env=select_launcher_env(os.environ),
            num_processes=get_world_size(),
        )

    def build_target(self) -> MemoryTarget:
        """Return the device and budget to fit."""
        facts = get_device_facts("cpu")
        if self.device_name != "cpu":
            facts = get_facts_by_torch_name(self.device_name, self.compute_capability)
        launch_config = build_launch_config(self.num_processes, self.launcher_env, with_micro_batch(self.recipe, 1))
        return MemoryTarget(facts, self.device_name, self.budget_bytes, launch_config)


class Advice(BaseModel):
    """The estimator's result."""

    model_config = ConfigDict(frozen=True)

    estimated_peak_bytes: int | None = None
    """Predicted minimum of a process's memory."""
    suggestion: str | None = None
    overrides: tuple[str, ...] = ()
    """Overrides of recipe keys that are predicted to fit."""
    error: str | None = None
    """Reason for which the estimate or the search failed."""


class MicroBatchChoice(BaseModel):
    """The sizes that replace ``train.micro_batch_size=auto``."""

    model_config = ConfigDict(frozen=True)

    micro_batch_size: int = 1
    evaluation_batch_size: int = 1
    note: str | None = None
    error: str | None = None


def request_advice(request: AdviceRequest) -> Advice:
    """Run :func:`advise` in a subprocess, with a timeout of some minutes so that the run can write its record."""
    line, error = _run_advisor(request, "advice")
    try:
        return Advice.model_validate_json(line)
    except ValidationError:
        return Advice(error=error)


def request_micro_batch(request: AdviceRequest) -> MicroBatchChoice:
    """Run :func:`build_micro_batch_choice` in a subprocess."""
    line, error = _run_advisor(request, "micro_batch")
    try:
        return MicroBatchChoice.model_validate_json(line)
    except ValidationError:
        return MicroBatchChoice(error=f"{error}; set train.micro_batch_size to a number")


def request_plan(request: AdviceRequest) -> Plan | UnplannedRun:
    """Run :func:`build_plan` in a subprocess."""
    line, error = _run_advisor(request, "plan")
    try:
        return _PLAN_ANSWER.validate_json(line)
    except ValidationError:
        return UnplannedRun(name=request.recipe.name, reason=error)


def _run_advisor(request: AdviceRequest, request_kind: str) -> tuple[str, str]:
    """Run the estimator in a subprocess; return its last line of output, or the error if that is invalid."""
    environment = without_launcher_env(os.environ)
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8"}
    try:
        process = subprocess.run(
            [sys.executable, "-m", __name__, request_kind],
            input=request.model_dump_json(),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            check=False,
            env=environment,
        )
    except OSError as error:
        return "", f"the estimator could not start: {error}"
    except subprocess.TimeoutExpired as timeout:  # the estimate is printed before the search starts
        stdout: str | bytes = timeout.stdout or b""
        line = _get_last_line(stdout if isinstance(stdout, str) else stdout.decode())
        return line, f"the estimator took over {_TIMEOUT_SECONDS} seconds"
    reason = _get_last_line(process.stderr) or process.returncode
    return _get_last_line(process.stdout), f"the estimator failed: {reason}"


def _get_last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def advise(request: AdviceRequest) -> Advice:
    """Estimate the recipe and find the cheapest change that is predicted to fit."""
    from peftbench.memory.estimate import estimate

    recipe = request.recipe
    try:
        target = request.build_target()
        plan = estimate(recipe, target.facts, target.device_name, launch_config=target.launch_config)
    except PeftbenchError as error:
        return Advice(error=str(error))
    needed = plan.process_bytes[0]
    print(Advice(estimated_peak_bytes=needed).model_dump_json(), flush=True)  # in case the search times out
    try:
        if request.phase in EVALUATION_PHASES:
            suggestion = suggest_evaluation(recipe, target)
        else:
            if plan.process_bytes[1] <= target.required_budget:  # the estimate was too low: less is needed than that
                target = replace(target, budget_bytes=plan.process_bytes[1] - 1)
            suggestion = suggest_change(recipe, target)
        return Advice(estimated_peak_bytes=needed, suggestion=suggestion.sentence, overrides=suggestion.overrides)
    except PeftbenchError as error:
        return Advice(estimated_peak_bytes=needed, error=str(error))


def build_micro_batch_choice(request: AdviceRequest) -> MicroBatchChoice:
    """Resolve ``train.micro_batch_size=auto``, or return the error."""
    try:
        recipe, note = choose_micro_batch(request.recipe, request.build_target())
    except PeftbenchError as error:
        return MicroBatchChoice(error=str(error))
    return MicroBatchChoice(
        micro_batch_size=recipe.train.resolved_micro_batch_size or 1,
        evaluation_batch_size=recipe.evaluate.batch_size,
        note=note,
    )


def build_plan(request: AdviceRequest) -> Plan | UnplannedRun:
    """Return the plan of the recipe on the requested device, or the reason why it has none."""
    tokens = request.labeled_tokens
    with nullcontext() if tokens is None else with_label_count(LabelCount(tokens, "the most in the run")):
        return plan_run(request.recipe, request.build_target)


_ANSWERS: dict[str, Callable[[AdviceRequest], BaseModel]] = {
    "advice": advise,
    "micro_batch": build_micro_batch_choice,
    "plan": build_plan,
}


def main() -> None:
    """Read a request from stdin and print the result of the kind that the first argument names."""
    from peftbench.common.libraries import quiet_libraries  # not needed by the calling run

    request = AdviceRequest.model_validate_json(sys.stdin.read())
    quiet_libraries()
    print(_ANSWERS[sys.argv[1]](request).model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
