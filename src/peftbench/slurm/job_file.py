"""The file in a run's folder with the SLURM job that it was last submitted as."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from peftbench.common.filesystem import write_atomically

JOB_FILE = "job.json"


class JobFile(BaseModel):
    """The SLURM job of one run."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    job_id: str
    """SLURM's job id: 12, or 12_3 for an array task."""
    log_path: str | None = None
    """The job's log."""
    requeue_count: int = 0
    """Number of times that the job has requeued itself."""

    def write(self, run_dir: Path) -> None:
        """Write the file to a run's folder.

        Raises:
            OutputError: it cannot be written.
        """
        write_atomically(run_dir / JOB_FILE, self.model_dump_json() + "\n")

    def read_final_result(self) -> dict[str, object] | None:
        """Return the result line of the run, which is the last line of JSON in its log; None if the log has none."""
        with suppress(OSError, ValueError, TypeError):
            path = Path(self.log_path or "")
            for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
                if line.startswith("{") and isinstance(result := json.loads(line), dict) and "outcome" in result:
                    return result
        return None


def read_job_file(run_dir: Path) -> JobFile | None:
    """Return the last job of the run in ``run_dir``, None if it was not submitted or the file cannot be read."""
    try:
        return JobFile.model_validate_json((run_dir / JOB_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError):
        return None
