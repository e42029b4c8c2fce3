"""Names, methods, order and samples of runs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from peftbench.record import RunRecord, Sample


def method_kind(record: RunRecord) -> str:
    """Return the run's method, e.g. lora."""
    return str(record.recipe["method"]["kind"])


def run_label(record: RunRecord) -> str:
    """Return the run's name, followed by its method if the name does not contain it."""
    return append_method(record.name, method_kind(record))


def append_method(name: str, kind: str) -> str:
    """Return ``name``, followed by the method if ``name`` does not contain it."""
    return name if kind in name else f"{name} ({kind})"


def sort_records(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Sort runs: baselines first, then by trainable parameters, then by name."""
    return sorted(records, key=lambda r: (r.parameters.trainable if r.parameters else -1, r.name))


def sample_key(sample: Sample) -> tuple[str, str, str]:
    """Return the key of a sample's example. The id alone is not enough: two datasets may use the same ids."""
    return sample.id, sample.prompt, sample.reference


def with_unique_names(records: Mapping[Path, RunRecord]) -> dict[Path, RunRecord]:
    """Return ``records`` (keyed by the path of their file) with unique names, so that no output mixes two runs.

    Two suites in one folder may have runs of the same name. A repeated name is replaced with the path of the run's
    folder relative to the common parent, e.g. "demo/lora". Unique names do not change.
    """
    if not records:
        return {}
    folders = {path: path.absolute().parent for path in records}
    common = os.path.commonpath([folder.parent for folder in folders.values()])
    relative_paths = {path: folder.relative_to(common).as_posix() for path, folder in folders.items()}
    names = {path: record.name for path, record in records.items()}
    while True:  # a path may be another run's name
        labels = {path: append_method(names[path], method_kind(record)) for path, record in records.items()}
        counts = Counter(labels.values())
        repeated = [path for path, label in labels.items() if counts[label] > 1 and names[path] != relative_paths[path]]
        if not repeated:
            break
        names |= {path: relative_paths[path] for path in repeated}
    return {
        path: record if names[path] == record.name else record.model_copy(update={"name": names[path]})
        for path, record in records.items()
    }
