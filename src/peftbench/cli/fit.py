"""The command ``fit``: what fits a memory budget, for a model and every method, or for one recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Optional

import typer

from peftbench.cli.fit_model import ModelFitOptions, print_model_fit
from peftbench.cli.fit_recipe import RecipeFitOptions, print_recipe_fit
from peftbench.cli.memory_target import TargetOptions, find_accelerate_file, load_device_facts
from peftbench.cli.options import AccelerateOption, BudgetOption, JsonOption, ProcessesOption
from peftbench.common.console import cli_errors
from peftbench.common.options import ConfigOption, join_arguments

_DEFAULT_TECHNIQUES, _DEFAULT_EXAMPLES = "checkpointing", 1000
_ModelArgument = Annotated[
    Optional[str],
    typer.Argument(
        metavar="MODEL | RECIPE.yaml",
        help="A model: a name on the Hub, a folder, or a config.json. Or a recipe file, which ends in .yaml or .yml.",
    ),
]
_OverridesArgument = Annotated[
    Optional[list[str]],
    typer.Argument(metavar="KEY.SUB=VALUE", help="Recipe keys to override, e.g. method.r=8."),
]
_DeviceOption = Annotated[
    Optional[str],
    typer.Option(
        "--device",
        "--gpu",
        help="Device to plan for, e.g. t4, a10g, h100 or cpu, or a file of peftbench calibrate. Default: a generic GPU "
        "of unknown memory size.",
    ),
]
_DataOption = Annotated[
    Optional[str],
    typer.Option("--data", metavar="FILE", help="File of examples. Default: rows with all tokens labeled."),
]
_MaxLengthOption = Annotated[
    Optional[int],
    typer.Option(min=1, help="Tokens of a row for the verdict. Default: the longest example of --data, or 1024."),
]
_ExamplesOption = Annotated[
    Optional[int],
    typer.Option(min=1, help="Number of examples whose hours are given. Default: those of --data, or 1000."),
]
_PriceOption = Annotated[
    Optional[float], typer.Option(min=0, help="Price of one device per hour. Adds the price of training.")
]
_WriteSuiteOption = Annotated[
    Optional[Path],
    typer.Option(metavar="DIR", help="Write a suite to this new folder, with one recipe for each method that fits."),
]
_TechniquesOption = Annotated[
    Optional[str],
    typer.Option(
        help="Of a recipe: comma-separated names of techniques to try, e.g. checkpointing,bf16; all: every technique. "
        "The error for an unknown name lists the known ones. Default: checkpointing.",
    ),
]
_VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify",
        metavar="",
        help="Of a recipe: check the fastest combination with two short runs: at the largest micro-batch predicted to "
        "fit, and at the next larger one, which should run out of memory.",
    ),
]
_FamilyOption = Annotated[
    Optional[str],
    typer.Option(
        "--largest-model",
        metavar="FAMILY",
        help="Of a recipe: find the largest model of this family that fits, not the largest micro-batch, e.g. llama3. "
        "The error for an unknown name lists the known ones.",
    ),
]


def fit(
    model: _ModelArgument = None,
    overrides: _OverridesArgument = None,
    config: ConfigOption = None,
    budget: BudgetOption = None,
    device: _DeviceOption = None,
    accelerate: AccelerateOption = None,
    processes: ProcessesOption = None,
    data: _DataOption = None,
    max_length: _MaxLengthOption = None,
    examples: _ExamplesOption = None,
    price: _PriceOption = None,
    write_suite: _WriteSuiteOption = None,
    techniques: _TechniquesOption = None,
    verify: _VerifyOption = False,
    family: _FamilyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find which methods of a model fit the budget, with which micro-batch and context length.

    For a recipe: find the largest micro-batch that fits with each combination of memory-saving techniques.

    The exit code is 0 if something surely fits, else 1.
    """
    with cli_errors():
        from peftbench.errors import RecipeError
        from peftbench.memory.model_fit.model_argument import find_model_argument

        facts = load_device_facts(device)
        arguments = join_arguments(model, overrides)
        named = find_model_argument(arguments)
        of_models = {"data": data, "max-length": max_length, "examples": examples, "price": price}
        of_recipes = {"techniques": techniques, "verify": verify or None, "largest-model": family, "config": config}
        options = TargetOptions(facts, device, budget, find_accelerate_file(accelerate), processes)
        if not arguments and not config:
            raise RecipeError("no model and no recipe was given", "pass e.g. Qwen/Qwen2.5-7B or recipes/demo/lora.yaml")
        if named is None:
            _refuse_options(of_models | {"write-suite": write_suite}, "a model; give one in place of the recipe")
            settings = RecipeFitOptions(arguments, config or [], techniques or _DEFAULT_TECHNIQUES, family, verify)
            has_fit = print_recipe_fit(settings, options, as_json=as_json)
        else:
            _refuse_options(of_recipes, "a recipe; give one in place of the model")
            if data is not None and examples is not None:
                raise RecipeError("--examples was given with --data, which has its own examples; omit one of them")
            if write_suite is not None and (accelerate is not None or processes is not None):
                raise RecipeError(
                    "--write-suite writes suites for one process, without --accelerate and --processes; omit them"
                )
            question = ModelFitOptions(*named, data, max_length, examples or _DEFAULT_EXAMPLES, price, write_suite)
            has_fit = print_model_fit(question, options, as_json=as_json)
        if not has_fit:
            raise typer.Exit(1)


def _refuse_options(values: Mapping[str, object], needs: str) -> None:
    """Refuse options of the other form of the command.

    Raises:
        OutOfRangeError: one is set.
    """
    from peftbench.errors import OutOfRangeError

    if given := [f"--{name}" for name, value in values.items() if value is not None]:
        raise OutOfRangeError(f"{given[0]} needs {needs}, or omit {given[0]}")
