"""The commands ``estimate`` and ``fit``: GPU memory of a recipe, predicted without a GPU."""

from __future__ import annotations

import gc
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from peftbench.cli.options import (
    AccelerateOption,
    BudgetOption,
    DeviceOption,
    JsonOption,
    ProcessesOption,
    UpdateFileOption,
    print_progress,
    print_to_stderr,
)
from peftbench.common.console import cli_errors
from peftbench.common.options import ConfigOption, OverridesArgument, RecipeArgument, join_arguments

if TYPE_CHECKING:
    from peftbench.memory.devices import DeviceFacts
    from peftbench.memory.launch_config import LaunchConfig
    from peftbench.memory.plan import Fit, Plan, UnplannedRun
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
_TechniquesOption = Annotated[
    str,
    typer.Option(
        help="Comma-separated names of techniques to try, e.g. checkpointing,bf16; all: every technique. The error for "
        "an unknown name lists the known ones."
    ),
]
_VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify",
        metavar="",
        help="Check the fastest combination with two short runs: at the largest micro-batch predicted to fit, and at "
        "the next larger one, which should run out of memory.",
    ),
]
_FamilyOption = Annotated[
    Optional[str],
    typer.Option(
        "--largest-model",
        metavar="FAMILY",
        help="Find the largest model of this family that fits, not the largest micro-batch, e.g. llama3. The error for "
        "an unknown name lists the known ones.",
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

    If it does not fit, the cheapest change that is predicted to fit is printed too.
    """
    from peftbench.common.libraries import imports_without_gc, quiet_libraries

    with cli_errors():
        facts = _load_device_facts(device)
        arguments = join_arguments(recipe, overrides)
        recipes = _load_recipes(suite, arguments, config or [])
        launch_file = _find_launch_file(accelerate, suite)
        with imports_without_gc():
            quiet_libraries()
            from tqdm.auto import tqdm

            from peftbench.memory.search import check_verdicts, plan_run
            from peftbench.report.tables.memory_plan import format_plan, format_plans
            from peftbench.report.tables.table import insert_block
        gc.freeze()  # imported objects live until the process ends: the collector need not traverse them

        build_target = partial(_build_target, facts, device, budget, launch_file, processes)
        plans: list[Plan | UnplannedRun]
        if suite is None:
            plan = _plan_with_suggestion(recipes[0], build_target(recipes[0]))
            plans, text = [plan], plan.model_dump_json(indent=1) if as_json else format_plan(plan)
        else:
            progress = tqdm(recipes, desc="simulating", unit="run", disable=None)
            plans = [plan_run(one, partial(build_target, one)) for one in progress]
            text = json.dumps([plan.model_dump() for plan in plans], indent=1) if as_json else format_plans(plans)
        if update_file is not None:
            insert_block(text, update_file, marker)
        else:
            print(text)
        if check:
            check_verdicts([plan for one, plan in zip(recipes, plans, strict=True) if one.method.is_trainable])


def _find_launch_file(accelerate: str | None, suite: Path | None = None) -> Path | None:
    """Return the accelerate config of the option, else the suite's, None without one."""
    from peftbench.distributed.accelerate_config import find_accelerate_config
    from peftbench.suite.expand import resolve_accelerate_config

    if accelerate is not None:
        return find_accelerate_config(accelerate)
    return None if suite is None else resolve_accelerate_config(suite)


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


def _plan_with_suggestion(recipe: Recipe, target: MemoryTarget) -> Plan:
    """Return the plan of a recipe and, if it does not fit the budget, the cheapest change that does."""
    from peftbench.errors import PeftbenchError
    from peftbench.memory.suggestion import suggest_change

    plan = target.plan(recipe)
    if plan.verdict in {None, "fits"}:
        return plan
    print_progress("searching for a change that fits")
    try:
        suggestion = suggest_change(recipe, target).sentence
    except PeftbenchError as error:  # the plan is valid without it
        suggestion = f"no suggestion: {error}"
    return plan.model_copy(update={"suggestion": suggestion})


def fit(
    recipe_file: RecipeArgument = None,
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    budget: BudgetOption = None,
    device: DeviceOption = None,
    accelerate: AccelerateOption = None,
    processes: ProcessesOption = None,
    techniques: _TechniquesOption = "checkpointing",
    verify: _VerifyOption = False,
    family: _FamilyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the largest micro-batch that fits the budget, for each combination of memory-saving techniques."""
    from peftbench.common.libraries import quiet_libraries
    from peftbench.errors import OutOfRangeError
    from peftbench.memory.plan import Fit
    from peftbench.recipe.arguments import load_recipe_from_arguments

    with cli_errors():
        facts = _load_device_facts(device)
        if verify and family is not None:
            raise OutOfRangeError("--verify runs the recipe's own model; leave --largest-model out")
        arguments = join_arguments(recipe_file, overrides)
        recipe = load_recipe_from_arguments("fit", arguments, config or [])
        quiet_libraries()
        from peftbench.memory.search import find_largest_model, strategies
        from peftbench.report.tables.memory_plan import format_fit
        from peftbench.suite.verify_fit import check_local_device

        if verify:
            check_local_device(facts)
        launch_file = _find_launch_file(accelerate)
        target = _build_target(facts, device, budget, launch_file, processes, recipe)
        if family is not None:
            models = find_largest_model(recipe, family, techniques, target)
            answer = Fit(budget_bytes=target.required_budget, models=models)
        else:
            answer = Fit(budget_bytes=target.required_budget, strategies=strategies(recipe, techniques, target))
        if verify and answer.strategies:
            answer = _verify(answer, target.resolve(recipe)[0], target, launch_file, processes)
        print(answer.model_dump_json(indent=1) if as_json else format_fit(answer))
        if not answer.has_fit:
            raise typer.Exit(1)


def _verify(answer: Fit, recipe: Recipe, target: MemoryTarget, accelerate: Path | None, processes: int | None) -> Fit:
    """Run the best strategy on this machine and return the answer with the result."""
    from peftbench.suite.launch import run_one
    from peftbench.suite.verify_fit import verify_strategy

    launch = partial(run_one, accelerate=accelerate, processes=processes)
    result = verify_strategy(recipe, answer.strategies[0], target, launch=launch, log_message=print_to_stderr)
    return answer.model_copy(update={"verification": result})


def _load_device_facts(device: str | None) -> DeviceFacts:
    from peftbench.memory.devices import UNKNOWN_DEVICE, get_device_facts

    return get_device_facts(device) if device else UNKNOWN_DEVICE


def _build_target(
    facts: DeviceFacts,
    device: str | None,
    budget: str | None,
    accelerate: Path | None,
    processes: int | None,
    recipe: Recipe,
) -> MemoryTarget:
    """Return the device, the budget and the launch that ``recipe`` is planned for."""
    from peftbench.memory.search import MemoryTarget

    size = _resolve_budget(budget, facts, recipe)
    return MemoryTarget(facts, device or facts.torch_name, size, _build_launch_config(accelerate, processes, recipe))


def _resolve_budget(requested: str | None, facts: DeviceFacts, recipe: Recipe) -> int | None:
    """Return the budget in bytes: the option's, else the recipe's, else the device's memory."""
    from peftbench.common.units import parse_size
    from peftbench.errors import BudgetError

    device_bytes = facts.least_memory
    size = recipe.budget.memory_bytes if requested is None else parse_size(requested)
    if size is not None and device_bytes and size > int(facts.memory[1]):
        raise BudgetError(
            f"the budget of {_format_gib(size)} exceeds the {_format_gib(int(facts.memory[1]))} of {facts.torch_name}; "
            "lower it, or omit it to use all of the device's memory"
        )
    return size or device_bytes or None


def _format_gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _build_launch_config(accelerate_config: Path | None, processes: int | None, recipe: Recipe) -> LaunchConfig:
    """Return the processes to plan for."""
    from peftbench.errors import BudgetError
    from peftbench.memory.launch_config import SINGLE_PROCESS, load_launch_config
    from peftbench.memory.search import with_micro_batch

    if accelerate_config is None and processes is not None:
        raise BudgetError("--processes needs a distributed engine; give --accelerate too")
    if accelerate_config is None:
        return SINGLE_PROCESS
    # The launch does not depend on the micro-batch size, which may be auto: any size will do.
    return load_launch_config(accelerate_config, processes, with_micro_batch(recipe, 1))
