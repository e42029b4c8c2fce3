"""``peftbench fit RECIPE.yaml``: the largest micro-batch or model that fits, with memory-saving techniques."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peftbench.cli.options import print_to_stderr

if TYPE_CHECKING:
    from peftbench.cli.memory_target import TargetOptions
    from peftbench.memory.plan import Fit
    from peftbench.memory.search import MemoryTarget
    from peftbench.recipe.schema import Recipe


@dataclass(frozen=True)
class RecipeFitOptions:
    """The recipe, and what is searched for it."""

    arguments: list[str]
    config: list[Path]
    techniques: str
    family: str | None
    verify: bool


def print_recipe_fit(settings: RecipeFitOptions, options: TargetOptions, *, as_json: bool) -> bool:
    """Print what fits; return whether anything fits.

    Raises:
        PeftbenchError: the recipe or an option is invalid, or the recipe's memory is not modeled.
    """
    from peftbench.common.libraries import quiet_libraries
    from peftbench.errors import OutOfRangeError
    from peftbench.memory.plan import Fit
    from peftbench.recipe.arguments import load_recipe_from_arguments

    if settings.verify and settings.family is not None:
        raise OutOfRangeError("--verify runs the recipe's own model; leave --largest-model out")
    recipe = load_recipe_from_arguments("fit", settings.arguments, settings.config)
    quiet_libraries()
    from peftbench.memory.search import find_largest_model, strategies
    from peftbench.report.tables.memory_plan import format_fit
    from peftbench.suite.verify_fit import check_local_device

    if settings.verify:
        check_local_device(options.facts)
    target = options.build_target(recipe)
    if settings.family is not None:
        models = find_largest_model(recipe, settings.family, settings.techniques, target)
        answer = Fit(budget_bytes=target.required_budget, models=models)
    else:
        answer = Fit(budget_bytes=target.required_budget, strategies=strategies(recipe, settings.techniques, target))
    if settings.verify and answer.strategies:
        answer = _verify(answer, target.resolve(recipe)[0], target, options)
    print(answer.model_dump_json(indent=1) if as_json else format_fit(answer))
    return answer.has_fit


def _verify(answer: Fit, recipe: Recipe, target: MemoryTarget, options: TargetOptions) -> Fit:
    """Run the best strategy on this machine and return the answer with the result."""
    from peftbench.suite.launch import run_one
    from peftbench.suite.verify_fit import verify_strategy

    launch = partial(run_one, accelerate=options.accelerate, processes=options.processes)
    result = verify_strategy(recipe, answer.strategies[0], target, launch=launch, log_message=print_to_stderr)
    return answer.model_copy(update={"verification": result})
