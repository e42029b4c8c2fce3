"""RunDir: the names and places of all files in a run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftbench.common.filesystem import path_exists, write_error
from peftbench.record import RECORD_FILE

if TYPE_CHECKING:
    from peftbench.recipe.schema import Recipe

STATUS_FILE = "status.json"
RECIPE_FILE = "recipe.yaml"
REFUSAL_FILE = "refusal.json"
LOCK_FILE = ".lock"
MODEL_DIR = "model"
CHECKPOINTS_DIR = "checkpoints"
BEST_WEIGHTS_DIR = "best_weights"
CHECKPOINT_METADATA_FILE = "checkpoint.json"
"""The last file written to a checkpoint: a checkpoint without it is incomplete."""
OFFLOAD_DIR = "offload"
SNAPSHOT_FILE = "oom_snapshot.pickle"
LOG_FILE = "log.txt"
TRAINING_FILE = "training.json"
"""In a saved model's folder: the training that the model comes from."""
OUTPUTS_FILE = "outputs.jsonl"
PARTIAL_SUFFIX = ".unfinished"
"""Suffix of a folder that is still being written."""
_CHECKPOINT_PREFIX = "step-"


@dataclass(frozen=True)
class RunDir:
    """The folder of one run. Creating a RunDir does not create the folder."""

    path: Path

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> RunDir:
        """Return the folder that a run of ``recipe`` writes to."""
        return cls(Path(recipe.output_dir) / recipe.name)

    def create(self) -> Path:
        """Create the folder if it does not exist and return its path.

        Raises:
            OutputError: it cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.path, error) from error
        return self.path

    @property
    def record_file(self) -> Path:
        """The run's record."""
        return self.path / RECORD_FILE

    @property
    def status_file(self) -> Path:
        """The progress of the running process."""
        return self.path / STATUS_FILE

    @property
    def refusal_file(self) -> Path:
        """The reason why the last attempt of a suite or a job did not start."""
        return self.path / REFUSAL_FILE

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe, written by ``peftbench run`` and ``peftbench submit``."""
        return self.path / RECIPE_FILE

    @property
    def log_file(self) -> Path:
        """Standard error of a run that a suite started."""
        return self.path / LOG_FILE

    @property
    def lock_file(self) -> Path:
        """Locked by the process that works in this folder."""
        return self.path / LOCK_FILE

    @property
    def model_dir(self) -> Path:
        """The saved model or adapter, with its tokenizer."""
        return self.path / MODEL_DIR

    @property
    def partial_model_dir(self) -> Path:
        """The model while it is being saved; renamed to ``model_dir`` once complete."""
        return self.path / f".{MODEL_DIR}{PARTIAL_SUFFIX}"

    @property
    def outputs_file(self) -> Path:
        """The generated text of every evaluated example, with its reference."""
        return self.path / OUTPUTS_FILE

    @property
    def checkpoints_dir(self) -> Path:
        """Checkpoints: one folder per training, one folder per step in it."""
        return self.path / CHECKPOINTS_DIR

    @property
    def best_weights_dir(self) -> Path:
        """The weights with the lowest held-out loss so far: one folder per training, one folder per step in it."""
        return self.path / BEST_WEIGHTS_DIR

    @property
    def offload_dir(self) -> Path:
        """DeepSpeed's swap files."""
        return self.path / OFFLOAD_DIR

    def snapshot_file(self, rank: int) -> Path:
        """Return the path of a rank's snapshot of the CUDA allocator, written when it runs out of memory."""
        return self.path / (SNAPSHOT_FILE if rank == 0 else f"rank{rank}_{SNAPSHOT_FILE}")

    def find_checkpoints(self) -> list[Path]:
        """Return the complete checkpoints of all trainings in this folder, newest step first."""
        if not path_exists(self.checkpoints_dir):
            return []
        return [
            checkpoint
            for _, checkpoint in sorted(
                (
                    (get_checkpoint_step(checkpoint), checkpoint)
                    for training_dir in self.checkpoints_dir.glob("*")
                    for checkpoint in list_checkpoints(training_dir)
                ),
                reverse=True,
            )
        ]

    def find_latest_checkpoint_step(self) -> int | None:
        """Return the step of the newest checkpoint, None if there is none."""
        return next(map(get_checkpoint_step, self.find_checkpoints()), None)


def get_checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of ``step``."""
    return f"{_CHECKPOINT_PREFIX}{step:08d}"


def get_checkpoint_step(checkpoint: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(checkpoint.name.removeprefix(_CHECKPOINT_PREFIX))


def list_checkpoints(training_dir: Path) -> list[Path]:
    """Return the complete checkpoints of one training, newest first."""
    metadata_files = training_dir.glob(f"{_CHECKPOINT_PREFIX}*[0-9]/{CHECKPOINT_METADATA_FILE}")
    return sorted((file.parent for file in metadata_files), reverse=True)
