"""Write an exported model to a folder: complete or, after an error, not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from peftbench.common.filesystem import as_os_error, path_exists, write_atomically, write_error
from peftbench.common.fingerprint import add_neutral_keys
from peftbench.errors import MergeError, MissingFileError, OutOfRangeError, OutputError, RecordError
from peftbench.export.base_reference import BaseReference, find_base
from peftbench.export.comparison import LogitComparison
from peftbench.export.merge import check_mergeable, check_space, resolve_dtype, write_merged_model
from peftbench.export.model_card import CARD_FILE, EXPORTED_RECIPE_FILE, ExportedModel, build_card
from peftbench.export.privacy import hide_folders
from peftbench.modeling.model_folder import ADAPTER_CONFIG_FILE
from peftbench.modeling.run_base import RunBase, read_finished_run
from peftbench.recipe.loader import parse_recipe, to_commented_yaml
from peftbench.record import RECORD_FILE
from peftbench.run_dir.layout import PARTIAL_SUFFIX, TRAINING_FILE
from peftbench.run_dir.lock import raise_if_locked

if TYPE_CHECKING:
    from peftbench.recipe.schema import Precision, Recipe

DEFAULT_EXPORT_DIR = "exports"
_OMITTED_FILES = frozenset({TRAINING_FILE, CARD_FILE})
"""Files of a saved model that are not part of an export: the link to the run's record, and peft's empty card."""


@dataclass(frozen=True)
class ExportRequest:
    """Options of an export."""

    run: Path
    """Folder of the run, or its record."""
    output: Path | None = None
    """Folder to write; None: one in ``DEFAULT_EXPORT_DIR``."""
    merge: bool = False
    """Write a whole model."""
    dtype: Precision | None = None
    """Type of the weights of a whole model; None: that of the base model."""
    repository: str | None = None
    """Name on the Hub that the card uses, None for the folder's."""


@dataclass(frozen=True)
class Export:
    """A written folder."""

    folder: Path
    comparison: LogitComparison | None
    """Check of a whole model; None for a copy of the saved one."""


def export_model(request: ExportRequest) -> Export:
    """Write the model of a finished run with its tokenizer, recipe and model card to a new folder.

    Raises:
        PeftbenchError: the run or the request does not allow it; nothing is left behind.
    """
    run = _find_run(request.run)
    recipe = parse_recipe(add_neutral_keys(run.record.recipe))
    output = request.output or Path(DEFAULT_EXPORT_DIR) / (run.record.name + "-merged" * request.merge)
    if path_exists(output):
        raise OutputError(f"{output} exists", "give another folder with --output, or remove it")
    _check_request(run, recipe, request)
    base = find_base(run)
    with _create_folder(output) as folder:
        comparison = None
        if request.merge:
            dtype = request.dtype or resolve_dtype(run, recipe.model)
            comparison = write_merged_model(run, recipe, dtype, folder)
        else:
            _copy_saved_model(run, base, folder)
        published = parse_recipe(hide_folders(recipe.model_dump(mode="json")) | {"output_dir": "runs"})
        write_atomically(folder / EXPORTED_RECIPE_FILE, to_commented_yaml(published))
        exported = ExportedModel(
            record=run.record,
            base=base,
            name=request.repository or output.name,
            is_adapter=(folder / ADAPTER_CONFIG_FILE).exists(),
            has_chat_template=_has_chat_template(folder),
            comparison=comparison,
        )
        write_atomically(folder / CARD_FILE, build_card(exported))
    return Export(output, comparison)


def _find_run(path: Path) -> RunBase:
    folder = path.parent if path.name == RECORD_FILE else path
    if not path_exists(folder):
        raise MissingFileError(f"{folder} does not exist", "give the folder of a run that was trained")
    if not path_exists(folder / RECORD_FILE):
        raise RecordError(f"{folder} has no {RECORD_FILE}", "give the folder of a run that was trained")
    raise_if_locked(folder)
    return read_finished_run(folder)


def _check_request(run: RunBase, recipe: Recipe, request: ExportRequest) -> None:
    """Check that the options fit the run.

    Raises:
        OutOfRangeError: ``--dtype`` without ``--merge``.
        MergeError: the adapter cannot be merged, or cannot be used without.
    """
    if request.merge:
        check_mergeable(run, recipe)
        return
    if request.dtype is not None:
        raise OutOfRangeError(
            f"--dtype={request.dtype} applies to a whole model, and without --merge the saved model is copied",
            "add --merge, or omit --dtype",
        )
    if run.has_adapter and (Path(recipe.model.path) / RECORD_FILE).is_file():
        raise MergeError(
            f"the adapter of {run.folder} belongs to the model of the run {recipe.model.path}, which is not "
            "available elsewhere",
            "add --merge",
        )


@contextmanager
def _create_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``output`` if the block ends without an error, and is removed otherwise.

    Raises:
        OutputError: it cannot be written.
    """
    partial = output.with_name(f".{output.name}{PARTIAL_SUFFIX}")
    created = [directory for directory in output.parents if not path_exists(directory)]
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        yield partial
        partial.rename(output)
    except BaseException as error:  # on interrupts too
        shutil.rmtree(partial, ignore_errors=True)
        for directory in created:
            with suppress(OSError):
                directory.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            raise write_error(output, as_os_error(error)) from error
        raise


def _copy_saved_model(run: RunBase, base: BaseReference, folder: Path) -> None:
    """Copy the saved model. An adapter's config then has the name of its base model, not its folder.

    Raises:
        DiskFullError: the disk has no room for it.
    """
    files = [file for file in sorted(run.model_dir.iterdir()) if file.is_file() and file.name not in _OMITTED_FILES]
    check_space(sum(file.stat().st_size for file in files), folder)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    config_file = folder / ADAPTER_CONFIG_FILE
    if config_file.exists():
        config: dict[str, Any] = json.loads(config_file.read_bytes())
        names = {key: base.adapter_base for key in ("base_model_name_or_path",) if key in config}
        tokenizer = {"tokenizer_name_or_path": base.adapter_base} if config.get("tokenizer_name_or_path") else {}
        write_atomically(config_file, json.dumps(config | names | tokenizer, indent=2, sort_keys=True) + "\n")


def _has_chat_template(folder: Path) -> bool:
    """True if the saved tokenizer has a chat template: a file of its own, or a key of an older version's config."""
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").exists() or (
        config.exists() and bool(json.loads(config.read_bytes()).get("chat_template"))
    )
