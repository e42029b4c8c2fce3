"""Write the methods that fit as a suite: a common file, one recipe each with its plan, and a suite per engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from peftbench.common.filesystem import write_atomically
from peftbench.errors import MissingFileError, OutputError
from peftbench.memory.devices import load_devices
from peftbench.memory.model_fit.engine_files import copy_engine_files
from peftbench.memory.model_fit.methods import FIT_METHODS, GLOBAL_BATCH_SIZE, FitRequest
from peftbench.modeling.model_folder import CONFIG_FILE
from peftbench.recipe.loader import merge_configs

if TYPE_CHECKING:
    from peftbench.memory.model_fit.answer import FitAnswer, MethodFit

_COMMON_FILE, _SUITE_FILE = "common.yaml", "suite.yaml"
_GIB, _MIB = 2**30, 2**20
_SYNTHETIC_STEPS, _SYNTHETIC_TEST = 20, 64
"""Steps and test examples of a suite without data, whose losses mean nothing."""


def check_suite_folder(folder: Path, model: str) -> None:
    """Check that the folder can be written and that recipes can name the model, before anything is planned.

    Raises:
        OutputError: the folder has files.
        MissingFileError: the model is a config file that is not in a folder of a model.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"--write-suite {folder} must be a new or an empty folder; give another one")
    if model.endswith(".json") and Path(model).name != CONFIG_FILE:
        raise MissingFileError(
            f"--write-suite needs a model that recipes can name, and {model} is a config file; give a folder with "
            f"{CONFIG_FILE}, or a name on the Hub"
        )


def write_fit_suite(answer: FitAnswer, request: FitRequest, folder: Path) -> list[str]:
    """Write the recipes of the methods that surely fit; return one line per suite with the command that runs it.

    Raises:
        OutputError: a file cannot be written.
    """
    fitting = [row for row in answer.methods if row.fits]
    if not fitting:
        return [f"no method surely fits, so {folder} was not written"]
    base = [*request.list_base_overrides(request.model_path), *_list_data_overrides(answer, request)]
    head = f"What the recipes share: {answer.model}, rows of up to {answer.reference_length} tokens."
    _write_yaml(
        folder / _COMMON_FILE, [head], merge_configs([], [*base, f"output_dir=runs/{folder.name}"]), drop="name"
    )
    for row in fitting:
        _write_recipe(answer, request, row, folder)
    engines = dict.fromkeys(_get_engine(row) for row in fitting)
    return [
        _write_suite_file(answer, folder, engine, [row for row in fitting if _get_engine(row) == engine])
        for engine in engines
    ]


def _list_data_overrides(answer: FitAnswer, request: FitRequest) -> list[str]:
    """Return the length of rows, and for synthetic rows the steps, the length and the number of test examples."""
    length = [f"data.max_length={answer.reference_length}"]
    if request.data_file is not None:
        return length
    lengths = f"[{answer.reference_length},{answer.reference_length}]"
    return [
        *length,
        f"data.source.completion_tokens={lengths}",
        f"data.test={_SYNTHETIC_TEST}",
        "train.epochs=null",
        f"train.steps={_SYNTHETIC_STEPS}",
    ]


def _write_recipe(answer: FitAnswer, request: FitRequest, row: MethodFit, folder: Path) -> None:
    assert row.plan is not None, "a method that fits has a plan"
    length = row.plan.sequence_length
    largest = next((limit.rows for limit in row.micro_batches if limit.length == length), 1)
    rows = max(1, min(largest, GLOBAL_BATCH_SIZE))
    sizes = [f"train.micro_batch_size={rows}", f"evaluate.batch_size={rows}", f"data.max_length={length}"]
    values = merge_configs([], row.overrides, [], [*request.overrides, *sizes])
    least, most = (size / _GIB for size in row.plan.process_bytes)
    header = [
        f"{row.title} of {answer.model} on {answer.device_name} ({answer.budget_bytes / _GIB:.2f} GiB).",
        f"One row of {length} tokens: {row.plan.peak.allocated_bytes / _GIB:.2f} GiB at the peak, {least:.2f} to "
        f"{most:.2f} GiB of the process.",
        f"Largest micro-batch that surely fits: {largest} rows; longest context: {row.longest_context} tokens.",
        f"Plan of this recipe: peftbench estimate {folder / row.name}.yaml {_format_target(answer, row, folder)}",
    ]
    _write_yaml(folder / f"{row.name}.yaml", header, {"extends": _COMMON_FILE, "name": row.name, **values})


def _format_target(answer: FitAnswer, row: MethodFit, folder: Path) -> str:
    """Return the options of ``peftbench estimate`` for the device, the budget and the engine."""
    options = [f"--device {answer.device_name}"] if answer.device_name in load_devices() else []
    options.append(f"--budget {answer.budget_bytes // _MIB}MiB")
    if (engine := _get_engine(row)) is not None:
        options.append(f"--accelerate {folder / engine}_accelerate.yaml")
    return " ".join(options)


def _get_engine(row: MethodFit) -> str | None:
    """Return the name of the accelerate config that the row needs, None for a single process."""
    return next(method.engine for method in FIT_METHODS if method.name == row.name)


def _write_suite_file(answer: FitAnswer, folder: Path, engine: str | None, rows: Sequence[MethodFit]) -> str:
    """Write the suite of one engine; return the command that runs it."""
    file = folder / (_SUITE_FILE if engine is None else f"{engine}_{_SUITE_FILE}")
    values: dict[str, Any] = {"name": folder.resolve().name, "recipes": [f"{row.name}.yaml" for row in rows]}
    if engine is not None:
        values["name"] = f"{folder.resolve().name}_{engine}"
        values["accelerate"] = copy_engine_files(engine, folder).name
    command = f"peftbench run {file}"
    _write_yaml(file, [f"Methods of {answer.model} that surely fit {answer.device_name}. Run: {command}"], values)
    return f"wrote {file}: {len(rows)} recipes; run them with: {command}"


def _write_yaml(file: Path, header: Iterable[str], values: dict[str, Any], drop: str | None = None) -> None:
    kept = {key: value for key, value in values.items() if key != drop}
    text = yaml.safe_dump(kept, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "".join(f"# {line}\n" for line in header) + text)
