"""Groups of runs that differ only in their seeds, and their mean metrics."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftbench.common.fingerprint import ANY_VALUE, NEUTRAL_VALUES, drop_neutral_keys
from peftbench.record import RunRecord, train_peak_bytes
from peftbench.report.analysis.quality_metrics import QualityMetric
from peftbench.report.runs import append_method, method_kind
from peftbench.report.text.escape import printable_line

Seed = tuple[int, int]
"""train.seed and data.seed."""

SEED_KEYS = ("train.seed", "data.seed")


@dataclass(frozen=True, eq=False)
class RunGroup:
    """Runs of one recipe with different seeds. Compared by identity, so that it can be a dict key."""

    label: str
    """Common part of the runs' names, on one line, with the method if the name lacks it; unique."""
    method_kind: str
    """Kind of the method, e.g. lora."""
    runs: tuple[RunRecord, ...]

    @property
    def ok_runs(self) -> tuple[RunRecord, ...]:
        """Runs with outcome ok; all metrics are of these."""
        return tuple(run for run in self.runs if run.outcome.kind == "ok")

    @property
    def is_trained(self) -> bool:
        """True if a run with outcome ok trained parameters; False for baselines, which do not depend on seeds."""
        return any(run.parameters is not None and run.parameters.trainable > 0 for run in self.ok_runs)

    @property
    def mean_peak_bytes(self) -> float | None:
        """Mean peak bytes of the training phase; None if unknown for a run."""
        return _mean_if_known(train_peak_bytes(run) for run in self.ok_runs)

    @property
    def peak_bytes_range(self) -> tuple[int, int] | None:
        """Smallest and largest peak bytes of the training phase; None if unknown for a run."""
        known = [peak for run in self.ok_runs if (peak := train_peak_bytes(run)) is not None]
        return (min(known), max(known)) if known and len(known) == len(self.ok_runs) else None

    @property
    def mean_train_seconds(self) -> float | None:
        """Mean seconds of the training phase; None if unknown for a run."""
        return _mean_if_known(run.train_seconds for run in self.ok_runs)

    @property
    def step_seconds_range(self) -> tuple[float, float] | None:
        """Smallest 10th and largest 90th percentile of step seconds; None if unknown for a run."""
        speeds = [run.throughput for run in self.ok_runs if run.throughput is not None]
        if not speeds or len(speeds) < len(self.ok_runs):
            return None
        return min(s.step_seconds_p10 for s in speeds), max(s.step_seconds_p90 for s in speeds)

    @property
    def mean_model_flops(self) -> float | None:
        """Mean model FLOPs of all steps; None if unknown for a run."""
        return _mean_if_known(run.flops.model_flops for run in self.ok_runs)

    def means_by_seed(self, metric: QualityMetric) -> tuple[float, ...]:
        """Return one finite value per seed: the mean of its runs, so that a repeated run does not count twice."""
        values: dict[Seed, list[float]] = {}
        for run in self.ok_runs:
            value = metric.get_value(run)
            if value is not None and math.isfinite(value):
                values.setdefault(seed_of(run), []).append(value)
        return tuple(statistics.fmean(same) for same in values.values())


def seed_of(run: RunRecord) -> Seed:
    """Return the seeds by which runs are paired."""
    return int(run.recipe["train"]["seed"]), int(run.recipe["data"]["seed"])


def group_runs(records: Sequence[RunRecord]) -> list[RunGroup]:
    """Return the groups of ``records``, in the order of their first runs."""
    groups = [
        _build_group(runs)
        for same in same_recipe_groups(records, SEED_KEYS)
        for on_device in _group_by(same, _device_key)
        for runs in _split_by_fingerprints(on_device)
    ]
    first = {id(record): index for index, record in enumerate(records)}
    return _with_unique_labels(sorted(groups, key=lambda group: first[id(group.runs[0])]))


def same_recipe_groups(records: Sequence[RunRecord], keys: Sequence[str]) -> list[list[RunRecord]]:
    """Group records whose recipes differ only in ``keys`` and in keys that change no result, in first-seen order."""
    return _group_by(records, lambda record: recipe_key(record.recipe, keys))


def recipe_key(recipe: Mapping[str, Any], ignored_keys: Sequence[str] = ()) -> str:
    """Return a recipe as JSON, without ``ignored_keys`` and keys that change no result."""
    neutral = NEUTRAL_VALUES | dict.fromkeys(ignored_keys, ANY_VALUE)
    return json.dumps(drop_neutral_keys(recipe, neutral), sort_keys=True)


def _group_by(records: Iterable[RunRecord], key: Callable[[RunRecord], object]) -> list[list[RunRecord]]:
    groups: dict[object, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return list(groups.values())


def _device_key(record: RunRecord) -> tuple[str, str, int]:
    return record.device.type, record.device.name, record.device.num_processes


def _split_by_fingerprints(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Split runs by model and data fingerprint. A run that failed before they were known joins the first match."""
    groups: list[tuple[dict[str, str], list[RunRecord]]] = []
    for record in sorted(records, key=lambda record: -len(_list_fingerprints(record))):
        known = _list_fingerprints(record)
        for group_fingerprints, runs in groups:
            if all(group_fingerprints.get(name, value) == value for name, value in known.items()):
                group_fingerprints.update(known)
                runs.append(record)
                break
        else:
            groups.append((known, [record]))
    position = {id(record): index for index, record in enumerate(records)}
    return [sorted(runs, key=lambda run: position[id(run)]) for _, runs in groups]


def _list_fingerprints(record: RunRecord) -> dict[str, str]:
    fingerprints = {
        "model": record.model_fingerprint,
        "config": record.model_config_fingerprint,
        "data": record.data_fingerprint,
    }
    return {name: value for name, value in fingerprints.items() if value is not None}


def _with_unique_labels(groups: Sequence[RunGroup]) -> list[RunGroup]:
    """Make labels unique: append the device if the devices differ, else a number."""
    named = []
    for one in groups:
        devices = [_device_key(other.runs[0]) for other in groups if other.label == one.label]
        differ_by_device = len(devices) > 1 and len(set(devices)) == len(devices)
        named.append(replace(one, label=f"{one.label} on {_device_label(one.runs[0])}") if differ_by_device else one)
    seen: Counter[str] = Counter()
    for index, one in enumerate(named):
        seen[one.label] += 1
        if seen[one.label] > 1:  # two suites in one folder may use the same run name
            named[index] = replace(one, label=f"{one.label} #{seen[one.label]}")
    return named


def _device_label(record: RunRecord) -> str:
    kind, name, processes = _device_key(record)
    return printable_line(name or kind) + (f" with {processes} processes" if processes > 1 else "")


def _build_group(runs: Sequence[RunRecord]) -> RunGroup:
    kind = method_kind(runs[0])
    return RunGroup(
        append_method(_common_name([printable_line(run.name) for run in runs]) or kind, kind), kind, tuple(runs)
    )


def _common_name(names: Sequence[str]) -> str:
    """Return the common part of names, e.g. ``lora`` of ``lora-seed=0`` and ``lora-seed=1``."""
    split_names = [name.split("-") for name in names]
    if len({len(parts) for parts in split_names}) == 1:
        common = "-".join(parts[0] for parts in zip(*split_names, strict=True) if len(set(parts)) == 1)
        if common:
            return common
    prefix = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in prefix).rstrip("-_=. ")


def _mean_if_known(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if not known or None in known else statistics.fmean(value for value in known if value is not None)
