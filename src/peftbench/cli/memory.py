"""The command ``estimate``: GPU memory of a recipe, predicted without a GPU."""

from __future__ import annotations

import gc
import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from peftbench.cli.memory_target import TargetOptions, find_accelerate_file, load_device_facts
from peftbench.cli.options import (
    AccelerateOption,
    BudgetOption,
    DeviceOption,
    JsonOption,
    ProcessesOption,
    UpdateFileOption,
    print_progress,
)
from peftbench.common.console import cli_errors
from peftbench.common.options import ConfigOption, OverridesArgument, RecipeArgument, join_arguments

if TYPE_CHECKING:
    from peftbench.memory.plan import Plan, UnplannedRun
    from peftbench.memory.search import MemoryTarget
    from peftbench.recipe.schema import Recipe


_SuiteOption = Annotated[Optional[Path], typer.Option(help="Suite file. Estimate all its runs, one row each.")]
_MarkerOption = Annotated[
    str,
    typer.Option(
        help="Name of the section, which starts with <!-- report:NAME --> and ends with <!-- end of report:NAME -->."
    ),
]
_CheckOption = Annotated[
    bool,
    typer.Option(
        "--check", metavar="", help="Exit with code 83 unless every run is predicted to fit. Useful in scripts."
    ),
]


def estimate(
    recipe: RecipeArgument = None,
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    suite: _SuiteOption = None,
    budget: BudgetOption = None,
    device: DeviceOption = None,
    accelerate: AccelerateOption = None,
    processes: ProcessesOption = None,
    update_file: UpdateFileOption = None,
    marker: _MarkerOption = "plan",
    check: _CheckOption = False,
    as_json: JsonOption = False,
) -> None:
    """Estimate the peak memory of a recipe and whether it fits the budget. Needs neither a GPU nor the weights.

    With a budget, the longest rows that fit are printed too; if the recipe does not fit, also the cheapest change that
    is predicted to fit.
    """
    from peftbench.common.libraries import imports_without_gc, quiet_libraries

    with cli_errors():
        facts = load_device_facts(device)
        arguments = join_arguments(recipe, overrides)
        recipes = _load_recipes(suite, arguments, config or [])
        options = TargetOptions(facts, device, budget, find_accelerate_file(accelerate, suite), processes)
        with imports_without_gc():
            quiet_libraries()
            from tqdm.auto import tqdm

            from peftbench.memory.search import check_verdicts, plan_run
            from peftbench.report.tables.memory_plan import format_plan, format_plans
            from peftbench.report.tables.table import insert_block
        gc.freeze()  # imported objects live until the process ends: the collector need not traverse them

        plans: list[Plan | UnplannedRun]
        if suite is None:
            plan = _plan_with_advice(recipes[0], options.build_target(recipes[0]))
            plans, text = [plan], plan.model_dump_json(indent=1) if as_json else format_plan(plan)
        else:
            progress = tqdm(recipes, desc="simulating", unit="run", disable=None)
            plans = [plan_run(one, partial(options.build_target, one)) for one in progress]
            text = json.dumps([plan.model_dump() for plan in plans], indent=1) if as_json else format_plans(plans)
        if update_file is not None:
            insert_block(text, update_file, marker)
        else:
            print(text)
        if check:
            check_verdicts([plan for one, plan in zip(recipes, plans, strict=True) if one.method.is_trainable])


def _load_recipes(suite: Path | None, arguments: list[str], config: list[Path]) -> list[Recipe]:
    """Return the recipe of the arguments, or the recipes of a suite.

    Raises:
        RecipeError: both were given, or a recipe is invalid.
    """
    from peftbench.errors import RecipeError
    from peftbench.recipe.arguments import check_is_suite, load_recipe_from_arguments, split_arguments
    from peftbench.suite.expand import expand

    if suite is None:
        return [load_recipe_from_arguments("estimate", arguments, config)]
    files, overrides = split_arguments(arguments)
    if files:
        raise RecipeError(f"--suite names the recipes itself; leave {files[0]} out")
    check_is_suite(suite, "estimate --suite")
    return expand(suite, overrides, config=config)


def _plan_with_advice(recipe: Recipe, target: MemoryTarget) -> Plan:
    """Return the plan of a recipe with the longest rows that fit the budget.

    If the recipe does not fit, the cheapest change that does is added too.
    """
    from peftbench.errors import PeftbenchError
    from peftbench.memory.longest_rows import find_longest_rows
    from peftbench.memory.suggestion import suggest_change

    plan = target.plan(recipe)
    if plan.verdict is None:
        return plan
    print_progress("searching for the longest rows that fit")
    with suppress(PeftbenchError):  # the plan is valid without them
        plan = plan.model_copy(update={"longest_rows": find_longest_rows(recipe, target, plan)})
    if plan.verdict == "fits":
        return plan
    print_progress("searching for a change that fits")
    try:
        suggestion = suggest_change(recipe, target).sentence
    except PeftbenchError as error:  # the plan is valid without it
        suggestion = f"no suggestion: {error}"
    return plan.model_copy(update={"suggestion": suggestion})
