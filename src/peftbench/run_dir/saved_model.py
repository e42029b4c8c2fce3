"""training.json in a saved model's folder: the training that the model comes from.

It connects the model with the run's record, so that a record is never taken to describe the model of another training.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from peftbench.common.filesystem import write_atomically
from peftbench.common.fingerprint import fingerprint_measured_training, fingerprint_training
from peftbench.common.schema import RecordModel
from peftbench.errors import RecordError
from peftbench.record import SCHEMA_VERSION, RunRecord, read_record
from peftbench.run_dir.layout import TRAINING_FILE, RunDir


class TrainingIdentity(RecordModel):
    """The training that a saved model comes from."""

    schema_version: int = 2
    """Schema of the record whose recipe keys the fingerprints are of; files of schema 2 do not state it."""
    run: str
    """Name of the run."""
    started_at: str
    """``started_at`` of the run's record."""
    training_fingerprint: str
    """Hash of the recipe keys that change a trained weight."""
    measurement_fingerprint: str
    """Hash of those and of the keys that change a measurement of the training."""
    model_fingerprint: str
    """Fingerprint of the base model."""
    model_config_fingerprint: str | None = None
    """Fingerprint of its config, as in the record."""
    data_fingerprint: str
    """Fingerprint of the training split."""

    def write(self, model_dir: Path) -> None:
        """Write the file into a folder with a saved model.

        Raises:
            OutputError: it cannot be written.
        """
        write_atomically(model_dir / TRAINING_FILE, self.model_dump_json(indent=1) + "\n")


def read_training_identity(run_dir: Path) -> TrainingIdentity | None:
    """Return the training that the saved model in ``run_dir`` comes from, None if it has no such model."""
    try:
        identity = TrainingIdentity.model_validate_json((RunDir(run_dir).model_dir / TRAINING_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return identity if identity.schema_version == SCHEMA_VERSION else _upgrade_identity(run_dir, identity)


def _upgrade_identity(run_dir: Path, identity: TrainingIdentity) -> TrainingIdentity:
    """Return the identity with the fingerprints of the current keys, from the record of the same training."""
    try:
        record = read_record(RunDir(run_dir).record_file)
    except RecordError:
        return identity
    if record.started_at != identity.started_at:
        return identity
    fingerprints = {
        "schema_version": SCHEMA_VERSION,
        "training_fingerprint": fingerprint_training(record.recipe),
        "measurement_fingerprint": fingerprint_measured_training(record.recipe),
    }
    return identity.model_copy(update=fingerprints)


def has_model_of(run_dir: Path, record: RunRecord) -> bool:
    """True if ``run_dir`` has the saved model that ``record`` describes. One without training.json is accepted."""
    identity = read_training_identity(run_dir)
    return RunDir(run_dir).model_dir.is_dir() and (identity is None or describes_model(record, identity))


def describes_model(record: RunRecord, identity: TrainingIdentity) -> bool:
    """True if ``record`` is that of the training with this identity."""
    return (identity.started_at, identity.training_fingerprint) == (
        record.started_at,
        fingerprint_training(record.recipe),
    )
