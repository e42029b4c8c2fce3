"""Results of a suite's runs that already exist and are valid on this machine."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from peftbench.common.filesystem import path_exists
from peftbench.run_dir.layout import RunDir
from peftbench.run_dir.results import load_existing_result, load_matching_record

if TYPE_CHECKING:
    from peftbench.recipe.schema import Recipe
    from peftbench.record import RunRecord


class ResultFinder:
    """Finds records of recipes, which are resolved for this machine, an accelerate config and the model's folder.

    A recipe is resolved only if its run folder has a record: resolving needs torch and the model's config.
    """

    def __init__(self, accelerate: Path | None = None) -> None:
        self.accelerate = accelerate
        self._resolved: dict[str, Recipe] = {}

    def find_existing_result(self, recipe: Recipe) -> RunRecord | None:
        """Return the record of a finished run of ``recipe`` whose data has not changed, None if there is none."""
        resolved = self.resolve(recipe)
        return None if resolved is None else load_existing_result(resolved)

    def find_matching_record(self, recipe: Recipe) -> RunRecord | None:
        """Return the record of ``recipe``, whatever its outcome; None if it is missing or of a changed recipe."""
        resolved = self.resolve(recipe)
        return None if resolved is None else load_matching_record(resolved)

    def resolve(self, recipe: Recipe) -> Recipe | None:
        """Return the resolved recipe; None without a record, or if it cannot be resolved, which the run will report."""
        if not path_exists(RunDir.from_recipe(recipe).record_file):
            return None
        if recipe.name not in self._resolved:
            with suppress(Exception):  # whatever is wrong with the model, the run itself reports it
                self._resolved[recipe.name] = resolve_for_accelerate_config(recipe, self.accelerate)
        unresolved = None if recipe.has_auto_settings else recipe.with_resolved_dtype()
        return self._resolved.get(recipe.name, unresolved)


def resolve_for_accelerate_config(recipe: Recipe, accelerate: Path | None) -> Recipe:
    """Return ``recipe`` resolved for this machine's device, the config's engine and the model's folder.

    Raises:
        PeftbenchError: the engine is unknown, the model's config was not found, or its quantization is unsupported.
    """
    if not recipe.needs_resolution:
        return recipe
    from peftbench.common.libraries import quiet_libraries
    from peftbench.distributed.device_capability import detect_device_capability
    from peftbench.memory.launch_config import SINGLE_PROCESS, load_launch_config
    from peftbench.memory.search import with_micro_batch
    from peftbench.training.auto_settings import resolve_auto_settings, resolve_task

    quiet_libraries()
    recipe, _ = resolve_task(recipe)
    launch_config = SINGLE_PROCESS
    if accelerate is not None:
        launch_config = load_launch_config(accelerate, None, with_micro_batch(recipe, 1))
    device = detect_device_capability(use_cpu=True if accelerate is not None and _requests_cpu(accelerate) else None)
    return resolve_auto_settings(recipe, launch_config.engine, device)[0]


def _requests_cpu(accelerate: Path) -> bool:
    return bool(OmegaConf.to_container(OmegaConf.load(accelerate)).get("use_cpu"))  # type: ignore[union-attr]
