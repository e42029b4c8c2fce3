"""The trained model: save it, and find and load that of an earlier process, to evaluate it without training."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from peftbench.common.filesystem import as_os_error, write_error
from peftbench.common.units import format_bytes
from peftbench.distributed.deepspeed import get_full_shape
from peftbench.distributed.sharding import full_weights
from peftbench.errors import DiskFullError, RecordError
from peftbench.modeling.loading import read_base_fingerprint
from peftbench.record import RunRecord, read_record
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
        DiskFullError: it has not.
    """
    model, method = adapted_model.model, state.recipe.method
    saved = [p for p in model.parameters() if p.requires_grad or not method.keeps_base_frozen]
    needed = sum(get_full_shape(parameter).numel() * parameter.element_size() for parameter in saved)
    free = shutil.disk_usage(state.run_dir.path).free
    if needed > free:
        raise DiskFullError(
            f"the trained model needs {format_bytes(needed)}, and the disk of {state.run_dir.path} has "
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
        adapted_model.base.tokenizer.save_pretrained(partial_dir)
        _build_training_identity(state, adapted_model).write(partial_dir)
        shutil.rmtree(model_dir, ignore_errors=True)
        partial_dir.rename(model_dir)
    except BaseException as error:  # after an interrupt too, no partial model is left
        shutil.rmtree(partial_dir, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise write_error(model_dir, as_os_error(error)) from error
        raise


def _build_training_identity(state: RunState, adapted_model: AdaptedModel) -> TrainingIdentity:
    return TrainingIdentity(
        run=state.recipe.name,
        started_at=state.started_at,
        training_fingerprint=state.requested_recipe.fingerprint_training(),
        measurement_fingerprint=state.requested_recipe.fingerprint_measured_training(),
        model_fingerprint=adapted_model.base.fingerprint,
        data_fingerprint=str(state.training_data_fingerprint),
    )


def delete_saved_model(state: RunState) -> None:
    """Delete the model of an earlier run in this folder: this run saves none, and replaces that run's record."""
    if state.accelerator.is_main_process:
        shutil.rmtree(state.run_dir.model_dir, ignore_errors=True)


def find_unevaluated_model(state: RunState) -> RunRecord | None:
    """Return the record of the saved model if this run would repeat its training, measured as before; else None.

    A run that has a complete result is repeated: it was requested again.
    """
    record, identity, recipe = _read_trained_record(state), read_training_identity(state.run_dir.path), state.recipe
    if record is None or identity is None or record.engine is None or not recipe.save_model:
        return None
    requested = state.requested_recipe
    is_complete = record.outcome.kind == "ok" and record.recipe_fingerprint == requested.fingerprint()
    is_same_launch = (record.engine.name, record.device.num_processes, record.device.type) == (
        state.engine.name,
        state.accelerator.num_processes,
        state.accelerator.device.type,
    )
    if (
        (is_complete and record.data_fingerprint == state.data_fingerprint)
        or not is_same_launch
        or state.engine.shards_weights  # an unsharded copy may not fit
        or identity.measurement_fingerprint != requested.fingerprint_measured_training()
        or identity.data_fingerprint != state.training_data_fingerprint
        or identity.model_fingerprint != read_base_fingerprint(recipe.model)
    ):
        return None
    return record


def find_model_to_evaluate(state: RunState) -> RunRecord:
    """Return the record of the saved model, whose training has this recipe.

    Raises:
        RecordError: the folder has no saved model with a record, or it is that of another training.
    """
    folder = state.run_dir.path
    record, identity = _read_trained_record(state), read_training_identity(folder)
    if record is None or identity is None:
        raise RecordError(
            f"{folder} has no saved model of a finished training with its record",
            f"train it with peftbench train {state.run_dir.recipe_file}",
        )
    if identity.training_fingerprint != state.requested_recipe.fingerprint_training():
        raise RecordError(
            f"the saved model in {folder} was trained with another recipe",
            "give only keys that change the evaluation, e.g. evaluate.batch_size=1, or train again",
        )
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
    assert state.trained_record is not None
    return load_trained_base_model(state.recipe, model_dir, str(state.trained_record.model_fingerprint))
