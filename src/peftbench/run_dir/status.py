"""Where a run stands, in a file beside its record that is renewed while it works."""

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

STATUS_FILE = "status.json"
_WRITE_INTERVAL_SECONDS = 5.0


class Status(BaseModel):
    """What is known of a run that works, or worked until it was gone."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    pid: int
    host: str
    job_id: str | None = None
    """SLURM's job, as its commands name it: 12, or 12_3 of an array."""
    restart_count: int = 0
    """How often SLURM began that job anew."""
    started_at: str
    updated_at: str
    phase: str = "starting"
    step: int = 0
    """Finished optimizer steps."""
    total_steps: int | None = None
    """Those of the whole training, None before it is known."""
    tokens_per_second: float | None = None
    """Real tokens of the steps since the status before."""
    seconds_left: float | None = None
    """Of training, at the pace of this process."""
    loss: float | None = None
    """Of the last step, in nats."""
    memory_bytes: int | None = None
    """What the main process held after the last step, as its budget counts it."""
    budget_bytes: int | None = None
    """What that process may have: budget.memory, or else the GPU's memory."""


def get_slurm_job_id() -> str | None:
    """The job that this process belongs to, as SLURM's commands name it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def read_status(run_dir: Path) -> Status | None:
    """The status in ``folder``, None where there is none that can be read."""
    try:
        return Status.model_validate_json((run_dir / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError):
        return None


class StatusWriter:
    """Tells where a run stands: at once when its phase is another, and every few seconds while it trains."""

    def __init__(self, run_dir: Path, *, enabled: bool) -> None:
        """``tells`` is false on all ranks but one."""
        self.path, self.enabled = run_dir / STATUS_FILE, enabled
        now = _get_utc_timestamp()
        self._status = Status(
            pid=os.getpid(),
            host=socket.gethostname(),
            job=get_slurm_job_id(),
            started_at=now,
            updated_at=now,
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        )
        self._last_write_time, self._tokens_since_write = float("-inf"), 0
        self._training_start: tuple[float, int] | None = None
        self._read_memory_bytes: Callable[[], int | None] = lambda: None

    def set_phase(self, name: str) -> None:
        """Another phase has begun."""
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
        """Training begins, with so many steps of so many done by a process before; told with what comes next.

        ``memory`` tells the bytes that stand against the budget, and is asked whenever a step is told.
        """
        self._read_memory_bytes = read_memory_bytes
        self._status = self._status.model_copy(
            update={"step": completed_steps, "steps": total_steps, "loss": loss, "budget_bytes": budget_bytes}
        )

    def update_step(self, step: int, total_steps: int, real_tokens: int, loss: float) -> None:
        """So many steps of so many are done, the last of which had that many real tokens and that loss."""
        now = time.monotonic()
        self._training_start = self._training_start or (now, step)
        self._tokens_since_write += real_tokens
        if now - self._last_write_time < _WRITE_INTERVAL_SECONDS and step < total_steps:
            return
        pace = (
            (now - self._training_start[0]) / (step - self._training_start[1])
            if step > self._training_start[1]
            else None
        )
        told = (
            self._tokens_since_write / (now - self._last_write_time)
            if self._last_write_time > self._training_start[0]
            else None
        )
        self._write(
            step=step,
            steps=total_steps,
            tokens_per_second=told,
            seconds_left=None if pace is None else pace * (total_steps - step),
            loss=loss,
            memory_bytes=self._read_memory_bytes(),
        )

    def delete(self) -> None:
        """Take it back: the run was refused."""
        if self.enabled:
            self.path.unlink(missing_ok=True)

    def _write(self, **changes: object) -> None:
        self._last_write_time, self._tokens_since_write = time.monotonic(), 0
        if not self.enabled:
            return
        self._status = self._status.model_copy(update={**changes, "updated_at": _get_utc_timestamp()})
        try:
            write_atomically(self.path, self._status.model_dump_json(indent=1) + "\n")
        except OutputError:  # a full disk must not end what would have had room for its record later
            return


def _get_utc_timestamp() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
