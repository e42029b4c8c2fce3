"""Names of runs by which a report can tell them apart."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from peftbench.record import RunRecord
from peftbench.report.tables.columns import append_method
from peftbench.report.text.formatting import method_kind


def with_unique_names(records: Mapping[Path, RunRecord]) -> dict[Path, RunRecord]:
    """``records`` by the paths of their files, no two of one name: two suites in one folder may have such runs.

    A name that repeats gives way to the path of the run's folder below what all folders lie in, as "demo/lora". What
    is shown, drawn and counted by name must not mix two runs. Records whose names differ stay as they are.
    """
    if not records:
        return {}
    folders = {path: path.absolute().parent for path in records}
    common = os.path.commonpath([folder.parent for folder in folders.values()])
    places = {path: folder.relative_to(common).as_posix() for path, folder in folders.items()}
    names = {path: record.name for path, record in records.items()}
    while True:  # a path may be another run's name
        labels = {path: append_method(names[path], method_kind(record)) for path, record in records.items()}
        seen = Counter(labels.values())
        repeated = [path for path, label in labels.items() if seen[label] > 1 and names[path] != places[path]]
        if not repeated:
            break
        names |= {path: places[path] for path in repeated}
    return {
        path: record if names[path] == record.name else record.model_copy(update={"name": names[path]})
        for path, record in records.items()
    }
