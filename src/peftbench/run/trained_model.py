"""The trained model: save it, and find and load that of an earlier process, to evaluate it without training."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from peftbench.common.filesystem import as_os_error, write_error
from peftbench.common.fingerprint import INTERVAL_KEYS, MEASUREMENT_KEYS, may_be_equal
from peftbench.common.nested_keys import flatten_keys
from peftbench.common.units import format_bytes
from peftbench.distributed.deepspeed import get_full_shape
from peftbench.distributed.sharding import full_weights
from peftbench.errors import DiskFullError, RecordError
from peftbench.modeling.loading import compute_config_fingerprint, read_base_fingerprint
from peftbench.modeling.saved_tokenizer import save_tokenizer
from peftbench.record import SCHEMA_VERSION, RunRecord, read_record
from peftbench.run_dir.saved_model import TrainingIdentity, describes_model, read_training_identity
from peftbench.training.build import load_trained_base_model

if TYPE_CHECKING:
    from pathlib import Path

    from peftbench.modeling.loading import LoadedModel
    from peftbench.run.state import RunState
    from peftbench.training.build import AdaptedModel


def check_disk_space(state: RunState, adapted_model: AdaptedModel) -> None:
    """Check before the training that the disk has room for the trained model; the main process saves it.

    Raises:
        DiskFullError: the free space is too small.
    """
    model, method = adapted_model.model, state.recipe.method
    saved = [p for p in model.parameters() if p.requires_grad or not method.keeps_base_frozen]
    needed = sum(get_full_shape(parameter).numel() * parameter.element_size() for parameter in saved)
    free = shutil.disk_usage(state.run_dir.path).free
    if needed > free:
        raise DiskFullError(
            f"the trained model needs {format_bytes(needed)}, but the disk of {state.run_dir.path} has "
            f"{format_bytes(free)} left",
            "free space, set output_dir to another disk, or set save_model=false",
        )


def save_model(state: RunState, adapted_model: AdaptedModel) -> None:
    """Save the trained model and its tokenizer: complete or, after an error, not at all. Collective.

    The model of an earlier training stays until the new one is complete.

    Raises:
        OutputError: it cannot be written.
    """
    is_main = state.accelerator.is_main_process
    with full_weights(state.engine, adapted_model.model, on_this_rank=is_main):
        if is_main:
            _write_model(state, adapted_model)
    state.has_saved_model = True


def _write_model(state: RunState, adapted_model: AdaptedModel) -> None:
    model_dir, partial_dir = state.run_dir.model_dir, state.run_dir.partial_model_dir
    try:
        shutil.rmtree(partial_dir, ignore_errors=True)  # of a run that was killed
        state.recipe.method.save(adapted_model.model, partial_dir)
        _save_generation_config(adapted_model, state.stop_ids, partial_dir)
        tokenizer = adapted_model.base.tokenizer
        save_tokenizer(tokenizer, state.recipe.task.find_chat_template(tokenizer), partial_dir)
        _build_training_identity(state, adapted_model).write(partial_dir)
        _replace_folder(model_dir, partial_dir)
    except BaseException as error:  # after an interrupt too, no partial model is left
        shutil.rmtree(partial_dir, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise write_error(model_dir, as_os_error(error)) from error
        raise


def _save_generation_config(adapted_model: AdaptedModel, stop_ids: Sequence[int], folder: Path) -> None:
    """Save the generation config, which an adapter lacks, with the ids that end a generated text."""
    config = copy.deepcopy(adapted_model.base.model.generation_config)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = sorted({*stop_ids, *(id for id in known if id is not None)})
    config.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    config.save_pretrained(folder)


def _replace_folder(folder: Path, new: Path) -> None:
    """Put ``new`` in the place of ``folder``, so that a kill leaves one of the two complete."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _build_training_identity(state: RunState, adapted_model: AdaptedModel) -> TrainingIdentity:
    return TrainingIdentity(
        schema_version=SCHEMA_VERSION,
        run=state.recipe.name,
        started_at=state.started_at,
        training_fingerprint=state.requested_recipe.fingerprint_training(),
        measurement_fingerprint=state.requested_recipe.fingerprint_measured_training(),
        model_fingerprint=adapted_model.base.fingerprint,
        model_config_fingerprint=adapted_model.base.config_fingerprint,
        data_fingerprint=str(state.training_data_fingerprint),
    )


def delete_saved_model(state: RunState) -> None:
    """Delete the model of an earlier run in this folder: this run saves none, and replaces that run's record."""
    if state.accelerator.is_main_process:
        shutil.rmtree(state.run_dir.model_dir, ignore_errors=True)


def find_unevaluated_model(state: RunState) -> RunRecord | None:
    """Return the record of the saved model if this run would repeat its training; else None.

    A training whose evaluation did not end is never repeated. Other trainings are repeated if the run would measure
    them differently, or has a complete result, since it was requested again.
    """
    record, identity, recipe = _read_trained_record(state), read_training_identity(state.run_dir.path), state.recipe
    if record is None or identity is None or record.engine is None or not recipe.save_model:
        return None
    requested = state.requested_recipe
    has_result = record.outcome.kind in {"ok", "diverged"}
    is_complete = has_result and record.recipe_fingerprint == requested.fingerprint()
    is_same_launch = (record.engine.name, record.device.num_processes, record.device.type) == (
        state.engine.name,
        state.accelerator.num_processes,
        state.accelerator.device.type,
    )
    is_same_measurement = identity.measurement_fingerprint == requested.fingerprint_measured_training()
    if (
        (is_complete and record.data_fingerprint == state.data_fingerprint)
        or not is_same_launch
        or identity.training_fingerprint != requested.fingerprint_training()
        or (has_result and not is_same_measurement)
        or identity.data_fingerprint != state.training_data_fingerprint
        or identity.model_fingerprint != read_base_fingerprint(recipe.model)
        or not may_be_equal(identity.model_config_fingerprint, compute_config_fingerprint(recipe.model))
    ):
        return None
    if state.engine.shards_weights:  # an unsharded copy on each process may not fit
        sys.stderr.write(
            f"note: to evaluate the saved model without training, peftbench evaluate {state.run_dir.path}\n"
        )
        return None
    if not is_same_measurement:
        state.notes.append(_describe_measured_settings(record.recipe, requested.model_dump(mode="json")))
    return record


def _describe_measured_settings(trained: Mapping[str, Any], requested: Mapping[str, Any]) -> str:
    """Return a note on the settings with which a training was measured, where the recipe has others now."""
    old, new = dict(flatten_keys(trained)), dict(flatten_keys(requested))
    measured = (*MEASUREMENT_KEYS, *INTERVAL_KEYS)
    keys = [key for key in old | new if key.startswith(measured) and old.get(key) != new.get(key)]
    return f"the training was measured with {', '.join(f'{key}={json.dumps(old.get(key))}' for key in keys)}"


def find_model_to_evaluate(state: RunState) -> RunRecord:
    """Return the record of the saved model, whose training has this recipe.

    Raises:
        RecordError: the folder has no saved model with a record, or it is that of another training.
    """
    folder = state.run_dir.path
    record, identity = _read_trained_record(state), read_training_identity(folder)
    if record is None or identity is None:
        raise RecordError(
            f"{folder} has no saved model with the record of its training",
            f"train it with peftbench train {state.run_dir.recipe_file}",
        )
    if identity.measurement_fingerprint != state.requested_recipe.fingerprint_measured_training():
        raise RecordError(
            f"the saved model in {folder} was trained with another recipe",
            "give only keys that change the evaluation, e.g. evaluate.batch_size=1, or train again",
        )
    if identity.data_fingerprint != state.training_data_fingerprint:
        state.notes.append("the training data have changed since the training")
        state.data_fingerprint = record.data_fingerprint  # so that the recipe counts as changed, and is trained again
    return record


def _read_trained_record(state: RunState) -> RunRecord | None:
    """Return the record in the run's folder if the saved model there is the one that it describes."""
    identity = read_training_identity(state.run_dir.path)
    try:
        record = read_record(state.run_dir.record_file)
    except RecordError:
        return None
    return record if identity is not None and describes_model(record, identity) else None


def load_trained_base(state: RunState, model_dir: Path) -> LoadedModel:
    """Load the base model of the training in ``state.trained_record``, with the trained weights that are part of it.

    Raises:
        ModelError, HubUnreachableError: as in :func:`peftbench.training.build.load_trained_base_model`.
    """
    record = state.trained_record
    assert record is not None
    return load_trained_base_model(
        state.recipe, model_dir, str(record.model_fingerprint), record.model_config_fingerprint
    )
