"""``peftbench fit MODEL``: which methods of a model fit a device, with which micro-batch and context length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from peftbench.cli.options import print_progress, print_to_stderr

if TYPE_CHECKING:
    from peftbench.cli.memory_target import TargetOptions
    from peftbench.memory.model_fit.method_search import FitSettings
    from peftbench.memory.model_fit.methods import FitMethod
    from peftbench.memory.model_fit.model_argument import ModelSource
    from peftbench.memory.search import MemoryTarget
    from peftbench.recipe.schema import Recipe


@dataclass(frozen=True)
class ModelFitOptions:
    """The model, the examples, and where to write recipes."""

    model: str
    overrides: list[str]
    data: str | None
    max_length: int | None
    num_examples: int
    price: float | None
    write_suite: Path | None


def print_model_fit(question: ModelFitOptions, options: TargetOptions, *, as_json: bool) -> bool:
    """Print which methods fit and write their suite if asked for; return whether any method surely fits.

    Raises:
        PeftbenchError: the model, an override, the budget or the data file cannot be used.
    """
    from peftbench.common.libraries import imports_without_gc, quiet_libraries

    _check_files(question)
    quiet_libraries()
    with imports_without_gc():
        from peftbench.memory.model_fit.method_search import fit_model
        from peftbench.memory.model_fit.model_argument import open_model
        from peftbench.memory.model_fit.suite_files import write_fit_suite
        from peftbench.report.tables.model_fit import format_model_fit

    with open_model(question.model) as source:
        settings = _build_settings(question, source, options)

        with TemporaryDirectory(prefix="peftbench-") as folder:
            build_target = partial(_build_method_target, options, Path(folder))
            answer = fit_model(settings, build_target, lambda title: print_progress(f"planning {title}"))
    print(answer.model_dump_json(indent=1) if as_json else format_model_fit(answer))
    if question.write_suite is not None:
        for line in write_fit_suite(answer, settings.request, question.write_suite):
            print_to_stderr(line)
    return answer.has_fit


def _check_files(question: ModelFitOptions) -> None:
    """Check the names of files before the model is read."""
    from peftbench.memory.model_fit.examples import check_data_file
    from peftbench.memory.model_fit.suite_files import check_suite_folder

    if question.data is not None:
        check_data_file(question.data)
    if question.write_suite is not None:
        check_suite_folder(question.write_suite, question.model)


def _build_method_target(options: TargetOptions, folder: Path, method: FitMethod, recipe: Recipe) -> MemoryTarget:
    """Return the target of a method; an engine of its own is copied to ``folder`` and has one process by default."""
    from peftbench.memory.model_fit.engine_files import copy_engine_files

    if method.engine is not None:
        processes = options.processes or 1
        config = copy_engine_files(method.engine, folder, processes)
        options = replace(options, accelerate=config, processes=processes)
    return options.build_target(recipe)


def _build_settings(question: ModelFitOptions, source: ModelSource, options: TargetOptions) -> FitSettings:
    """Return what all rows have in common; reads the examples if there is a file."""
    from peftbench.errors import OutOfRangeError
    from peftbench.memory.model_fit.examples import measure_examples
    from peftbench.memory.model_fit.method_search import FitSettings
    from peftbench.memory.model_fit.methods import FitRequest, build_any_recipe
    from peftbench.modeling.loading import get_max_positions

    overrides = list(question.overrides)
    max_positions = get_max_positions(source.config)
    if question.max_length is not None and max_positions is not None and question.max_length > max_positions:
        raise OutOfRangeError(
            f"--max-length {question.max_length} exceeds the model's {max_positions} positions; give at most that many"
        )
    if question.max_length is not None:
        overrides.append(f"data.max_length={question.max_length}")
    request = FitRequest(source.path, source.config_path, tuple(overrides), question.data)
    recipe = build_any_recipe(request)
    target = options.build_target(recipe)
    examples, data_note = (None, None) if question.data is None else measure_examples(recipe, source.path)
    return FitSettings(
        request=request,
        device_name=target.device_name,
        budget_bytes=target.required_budget,
        max_positions=max_positions,
        parameters=source.parameters,
        num_examples=question.num_examples,
        max_length=question.max_length,
        price_per_hour=question.price,
        examples=examples,
        data_note=data_note,
    )
