"""refusal.json in a run's folder: why the last attempt of a suite or a job ended before the run started."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from peftbench.common.filesystem import write_atomically
from peftbench.errors import OutputError
from peftbench.run_dir.layout import RunDir


class Refusal(BaseModel):
    """The reason why a run did not start. The next start deletes the file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    outcome: Literal["refused", "crashed"] = "refused"
    """refused: by an error of the input; crashed: the process ended without a result."""
    error: str

    @property
    def state(self) -> str:
        """State of the run in ``peftbench status``."""
        return "refused" if self.outcome == "refused" else "failed"


def write_refusal(run_dir: Path, refusal: Refusal) -> None:
    """Write the file to the folder of a run that a suite or a job has prepared; do nothing for another folder.

    A folder that cannot be written keeps its files: the error itself is printed anyway.
    """
    if RunDir(run_dir).recipe_file.exists():
        with suppress(OutputError):
            write_atomically(RunDir(run_dir).refusal_file, refusal.model_dump_json(indent=1) + "\n")


def read_refusal(run_dir: Path) -> Refusal | None:
    """Return why the last attempt of the run did not start; None if it started, or the file cannot be read."""
    try:
        return Refusal.model_validate_json(RunDir(run_dir).refusal_file.read_bytes())
    except (OSError, ValidationError):
        return None


def delete_refusal(run_dir: Path) -> None:
    """Delete the file, since the run starts again or has a result."""
    with suppress(OSError):
        RunDir(run_dir).refusal_file.unlink(missing_ok=True)
