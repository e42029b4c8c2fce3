"""Rewrite records of earlier schemas in place: ``python -m peftbench.record.rewrite FOLDER...``."""

from __future__ import annotations

import sys
from pathlib import Path

from peftbench.common.filesystem import write_atomically
from peftbench.record.run_record import RECORD_FILE, read_record


def rewrite_records(root: Path) -> int:
    """Write every record below ``root`` in the current schema; return their number.

    Raises:
        RecordError: a file is not a record.
        OutputError: a record cannot be written.
    """
    paths = sorted(root.rglob(RECORD_FILE))
    for path in paths:
        write_atomically(path, read_record(path).model_dump_json(indent=2) + "\n")
    return len(paths)


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        print(f"{folder}: {rewrite_records(folder)} records")  # noqa: T201
