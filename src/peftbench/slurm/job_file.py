"""Which job of SLURM a run was last handed in as, in a file beside its recipe."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from peftbench.common.filesystem import write_atomically

JOB_FILE = "job.json"


class JobFile(BaseModel):
    """A job, as far as it concerns one run."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    job_id: str
    """As SLURM's commands name it: 12, or 12_3 of an array."""
    log_path: str | None = None
    """What it printed."""
    requeue_count: int = 0
    """How often it has begun itself anew."""

    def write(self, run_dir: Path) -> None:
        """Keep it in a run's folder.

        Raises:
            OutputError: it cannot be written.
        """
        write_atomically(run_dir / JOB_FILE, self.model_dump_json() + "\n")

    def read_final_result(self) -> dict[str, object] | None:
        """What the run said at its end: the last line of its log, where that is what a run says."""
        with suppress(OSError, ValueError, TypeError):
            path = Path(self.log_path or "")
            for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
                if line.startswith("{") and isinstance(said := json.loads(line), dict) and "outcome" in said:
                    return said
        return None


def read_job_file(run_dir: Path) -> JobFile | None:
    """What a run in ``folder`` was last handed in as, None where it was not, or where that cannot be read."""
    try:
        return JobFile.model_validate_json((run_dir / JOB_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError):
        return None
