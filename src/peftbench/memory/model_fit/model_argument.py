"""The argument MODEL of ``peftbench fit``: a folder, a config.json, a shipped config's name, or a name on the Hub."""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from peftbench.errors import (
    HubUnreachableError,
    ModelError,
    ModelNotFoundError,
    RecipeError,
    UnsupportedModelError,
)
from peftbench.memory.families import find_member, list_model_names, with_bundled_config
from peftbench.modeling.model_folder import CONFIG_FILE
from peftbench.recipe.arguments import split_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


_RECIPE_SUFFIXES = (".yaml", ".yml")
_CONFIG_KEYS = ("model_type", "architectures")
"""Every config.json has at least one of these keys."""


@dataclass(frozen=True)
class ModelSource:
    """Paths of a model's config and files."""

    path: str
    """The model for a recipe: a folder, or a name on the Hub. It may lack weights."""
    config_path: str
    """The model whose config is read: ``path``, or a temporary folder with a copy of a config file."""
    config: PreTrainedConfig
    parameters: int
    """Parameters of the model; a tied head is counted once."""


def find_model_argument(arguments: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the model and the overrides; None if the arguments name a recipe or have overrides alone.

    A recipe ends in .yaml or .yml, or is the record of a run (.json). An override contains "=". Anything else is a
    model.

    Raises:
        RecipeError: there are two models, or a model and a recipe.
    """
    folders = [argument for argument in arguments if (Path(argument) / CONFIG_FILE).is_file()]
    files, overrides = split_arguments([argument for argument in arguments if argument not in folders])
    names = [str(file) for file in files]
    recipes = [name for name in names if _is_recipe(name)]
    models = [*folders, *(name for name in names if name not in recipes)]
    if not models:
        return None
    if others := [*models[1:], *recipes]:
        raise RecipeError(f"peftbench fit takes one model or one recipe, and {others[0]} is a second argument; omit it")
    return models[0], overrides


def _is_recipe(name: str) -> bool:
    """True for a YAML file, and for a JSON file that exists and is not a config.json of a model."""
    if name.endswith(_RECIPE_SUFFIXES):
        return True
    return name.endswith(".json") and Path(name).is_file() and not _is_model_config(Path(name))


def _is_model_config(file: Path) -> bool:
    if file.name == CONFIG_FILE:
        return True
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and any(key in content for key in _CONFIG_KEYS)


@contextmanager
def open_model(argument: str) -> Iterator[ModelSource]:
    """Read the config of a model; a config file is copied to a temporary folder, since only the config is needed.

    Raises:
        ModelNotFoundError, HubUnreachableError: there is no such folder, file, shipped config or model on the Hub.
        UnsupportedModelError: it is not a causal language model.
    """
    file = Path(argument)
    if not (argument.endswith(".json") and file.is_file()):
        name = argument if file.exists() else _find_shipped_name(argument) or argument
        yield ModelSource(name, name, *_read_model(name))
        return
    with TemporaryDirectory(prefix="peftbench-") as folder:
        shutil.copyfile(file, Path(folder) / CONFIG_FILE)
        yield ModelSource(str(file.parent), folder, *_read_model(folder, argument))


def _find_shipped_name(argument: str) -> str | None:
    """Return the full name of a shipped config by its name, or by the part after the owner, in any case."""
    found = find_member(argument)
    if found is None:
        return None
    wanted = argument.casefold()
    return next(name for name in found[1].names if wanted in {name.casefold(), _get_short_name(name)})


def _get_short_name(name: str) -> str:
    return name.rpartition("/")[2].casefold()


def _find_nearest_name(name: str) -> str:
    """Return the shipped name that is most similar, compared without the owner."""
    names = {_get_short_name(shipped): shipped for shipped in list_model_names()}
    return names[difflib.get_close_matches(_get_short_name(name), names, n=1, cutoff=0.0)[0]]


def _read_model(path: str, argument: str | None = None) -> tuple[PreTrainedConfig, int]:
    """Return the config at ``path`` and the number of parameters, of a model that is built without values.

    Errors name ``argument`` instead of a temporary folder.
    """
    import torch

    from peftbench.memory.simulation.model import build_meta_model
    from peftbench.modeling.loading import load_config
    from peftbench.recipe.schema import Model

    try:
        with with_bundled_config(Model(path=path)) as model:
            config = load_config(model)
            base = build_meta_model(model, torch.float32).model
    except (HubUnreachableError, ModelNotFoundError) as error:
        if Path(path).exists():
            raise type(error)(_replace_path(error, path, argument)) from error
        raise type(error)(
            f"the config of {path!r} was not found in a folder, among the shipped configs or on the Hub",
            f"give a folder, a config.json or the name of a shipped config, e.g. {_find_nearest_name(path)}",
        ) from error
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            str(error).partition("; ")[0].replace(path, argument or path), "give a causal language model"
        ) from error
    except ModelError as error:
        raise type(error)(_replace_path(error, path, argument)) from error
    return config, sum(parameter.numel() for parameter in base.parameters())


def _replace_path(error: ModelError | HubUnreachableError, path: str, argument: str | None) -> str:
    return str(error).replace(path, argument or path)
