"""status.json: the progress of a run, rewritten while the run works."""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from peftbench.common.filesystem import write_atomically
from peftbench.errors import OutputError
from peftbench.run_dir.layout import RunDir

_WRITE_INTERVAL_SECONDS = 5.0


class Status(BaseModel):
    """The progress of a run, as its main process last wrote it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    pid: int
    host: str
    job_id: str | None = None
    """SLURM job id as squeue prints it: 12, or 12_3 for an array task."""
    restart_count: int = 0
    """Number of times SLURM requeued the job."""
    started_at: str
    updated_at: str
    phase: str = "starting"
    step: int = 0
    """Finished optimizer steps."""
    total_steps: int | None = None
    """Optimizer steps of the whole training, None before training starts."""
    tokens_per_second: float | None = None
    """Real tokens per second since the previous status."""
    seconds_left: float | None = None
    """Estimated seconds of training left, at this process's mean step time."""
    loss: float | None = None
    """Loss of the last step, in nats."""
    memory_bytes: int | None = None
    """Memory of the main process after the last step, in bytes, counted as the budget counts it."""
    budget_bytes: int | None = None
    """Memory limit of that process, in bytes: budget.memory, or the GPU's memory if not set."""


def get_slurm_job_id() -> str | None:
    """Return the SLURM job id of this process as squeue prints it, None outside of a job."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def read_status(run_dir: Path) -> Status | None:
    """Return the status in ``run_dir``, None if it is missing or unreadable."""
    try:
        return Status.model_validate_json(RunDir(run_dir).status_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError):
        return None


class StatusWriter:
    """Writes status.json: on every change of phase, and every few seconds during training."""

    def __init__(self, run_dir: Path, *, enabled: bool) -> None:
        """``enabled`` is True on the main process only."""
        self.path, self.enabled = RunDir(run_dir).status_file, enabled
        now = _get_utc_timestamp()
        self._status = Status(
            pid=os.getpid(),
            host=socket.gethostname(),
            job_id=get_slurm_job_id(),
            started_at=now,
            updated_at=now,
            restart_count=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        )
        self._last_write_time, self._tokens_since_write = float("-inf"), 0
        self._training_start: tuple[float, int] | None = None
        self._read_memory_bytes: Callable[[], int | None] = lambda: None

    def set_phase(self, name: str) -> None:
        """Record that phase ``name`` began."""
        self._write(phase=name)

    def start_training(
        self,
        completed_steps: int,
        total_steps: int,
        *,
        loss: float | None = None,
        read_memory_bytes: Callable[[], int | None] = lambda: None,
        budget_bytes: int | None = None,
    ) -> None:
        """Set the values that training starts with; they are written with the next phase or step.

        ``completed_steps`` were trained by an earlier process. ``read_memory_bytes`` returns the bytes that count
        against the budget; it is called whenever a step is written.
        """
        self._read_memory_bytes = read_memory_bytes
        self._status = self._status.model_copy(
            update={"step": completed_steps, "total_steps": total_steps, "loss": loss, "budget_bytes": budget_bytes}
        )

    def update_step(self, step: int, total_steps: int, real_tokens: int, loss: float) -> None:
        """Record that ``step`` of ``total_steps`` steps is done; it had ``real_tokens`` tokens over all ranks."""
        now = time.monotonic()
        self._training_start = self._training_start or (now, step)
        self._tokens_since_write += real_tokens
        if now - self._last_write_time < _WRITE_INTERVAL_SECONDS and step < total_steps:
            return
        seconds_per_step = (
            (now - self._training_start[0]) / (step - self._training_start[1])
            if step > self._training_start[1]
            else None
        )
        tokens_per_second = (
            self._tokens_since_write / (now - self._last_write_time)
            if self._last_write_time > self._training_start[0]
            else None
        )
        self._write(
            step=step,
            total_steps=total_steps,
            tokens_per_second=tokens_per_second,
            seconds_left=None if seconds_per_step is None else seconds_per_step * (total_steps - step),
            loss=loss,
            memory_bytes=self._read_memory_bytes(),
        )

    def delete(self) -> None:
        """Delete the file, since the run was refused."""
        if self.enabled:
            self.path.unlink(missing_ok=True)

    def _write(self, **changes: object) -> None:
        self._last_write_time, self._tokens_since_write = time.monotonic(), 0
        if not self.enabled:
            return
        self._status = self._status.model_copy(update={**changes, "updated_at": _get_utc_timestamp()})
        try:
            write_atomically(self.path, self._status.model_dump_json(indent=1) + "\n")
        except OutputError:  # a full disk must not end a run that may have room for its record later
            return


def _get_utc_timestamp() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
