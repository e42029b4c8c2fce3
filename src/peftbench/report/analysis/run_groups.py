"""Configurations: the runs that differ in nothing but their seeds, and what they come to together."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftbench.record import RunRecord, train_peak_bytes
from peftbench.report.runs import append_method, method_kind
from peftbench.report.text.escape import printable_line

Seed = tuple[int, int]
"""train.seed and data.seed."""

SEED_KEYS = ("train.seed", "data.seed")

NON_NUMERIC_KEYS = ("name", "output_dir", "save_model", "trackers", "checkpoint", "profile.price_per_hour")
"""Knobs that change no number: what a recipe's fingerprint leaves out. A test holds the two together."""

NEUTRAL_WHEN_NULL = {"budget": "budget.memory", "train.feature_cache": "train.feature_cache"}
"""Knobs that change nothing as long as another one is null or, in an older record, is not there."""


@dataclass(frozen=True, eq=False)
class RunGroup:
    """Runs of one recipe, with other seeds. Equal only to itself, so that it can be a key."""

    label: str
    """What the runs' names share, on one line, and the method where that does not say it; no two have the same."""
    method_kind: str
    """Of the method."""
    runs: tuple[RunRecord, ...]

    @property
    def ok_runs(self) -> tuple[RunRecord, ...]:
        """The runs that ended well: figures are of these."""
        return tuple(run for run in self.runs if run.outcome.kind == "ok")

    @property
    def is_trained(self) -> bool:
        """Whether a run that ended well changed a parameter; of a baseline none does, and no seed matters to it."""
        return any(run.parameters is not None and run.parameters.trainable > 0 for run in self.ok_runs)

    @property
    def mean_peak_bytes(self) -> float | None:
        """Mean peak of the training phase; None where a run's is not known."""
        return _mean_if_known(train_peak_bytes(run) for run in self.ok_runs)

    @property
    def peak_bytes_range(self) -> tuple[int, int] | None:
        """The least and the greatest peak of the runs' training phases, in bytes; None where one is not known."""
        known = [peak for run in self.ok_runs if (peak := train_peak_bytes(run)) is not None]
        return (min(known), max(known)) if known and len(known) == len(self.ok_runs) else None

    @property
    def mean_train_seconds(self) -> float | None:
        """Mean seconds of the training phase; None where a run's are not known."""
        return _mean_if_known(run.train_seconds for run in self.ok_runs)

    @property
    def step_seconds_range(self) -> tuple[float, float] | None:
        """The least tenth and the greatest ninetieth percentile of the runs' step seconds; None where not known."""
        speeds = [run.throughput for run in self.ok_runs if run.throughput is not None]
        if not speeds or len(speeds) < len(self.ok_runs):
            return None
        return min(s.step_seconds_p10 for s in speeds), max(s.step_seconds_p90 for s in speeds)

    @property
    def mean_model_flops(self) -> float | None:
        """Mean of the FLOPs that all steps needed; None where a run's are not known."""
        return _mean_if_known(run.flops.model_flops for run in self.ok_runs)

    @property
    def held_out_losses(self) -> tuple[float, ...]:
        """Held-out losses in nats, one a seed, of the runs that have one that is a number."""
        return self._mean_by_seed(lambda run: run.quality.loss if run.quality else None)

    @property
    def rouge_l_scores(self) -> tuple[float, ...]:
        """ROUGE-L (0 to 100) of generated summaries, one a seed, of the runs that wrote some."""
        return self._mean_by_seed(_rouge_l_score)

    def _mean_by_seed(self, get_value: Callable[[RunRecord], float | None]) -> tuple[float, ...]:
        """A figure of each seed: one that was run twice tells no more of seeds than one that was run once."""
        found: dict[Seed, list[float]] = {}
        for run in self.ok_runs:
            value = get_value(run)
            if value is not None and math.isfinite(value):
                found.setdefault(seed_of(run), []).append(value)
        return tuple(statistics.fmean(same) for same in found.values())


def seed_of(run: RunRecord) -> Seed:
    """What a run is paired with another one by."""
    return int(run.recipe["train"]["seed"]), int(run.recipe["data"]["seed"])


def group_runs(records: Sequence[RunRecord]) -> list[RunGroup]:
    """The configurations of ``records``, in the order in which their first runs come."""
    found = [
        _build_group(runs)
        for same in same_recipe_groups(records, SEED_KEYS)
        for there in _group_by(same, _device_key)
        for runs in _split_by_fingerprints(there)
    ]
    first = {id(record): place for place, record in enumerate(records)}
    return _with_unique_labels(sorted(found, key=lambda one: first[id(one.runs[0])]))


def same_recipe_groups(records: Sequence[RunRecord], keys: Sequence[str]) -> list[list[RunRecord]]:
    """Groups of records whose recipes differ in nothing but ``knobs`` and what changes no number.

    They are in the order in which they first come.
    """
    return _group_by(records, lambda record: recipe_key(record.recipe, keys))


def recipe_key(recipe: Mapping[str, Any], ignored_keys: Sequence[str] = ()) -> str:
    """JSON of a recipe without ``knobs`` and without what changes no number."""
    out = [*NON_NUMERIC_KEYS, *ignored_keys]
    out += [knob for knob, asked in NEUTRAL_WHEN_NULL.items() if _get_key(recipe, asked) is None]
    left = dict(recipe)
    for knob in out:
        *parents, last = knob.split(".")
        place = left
        for parent in parents:
            place[parent] = dict(place.get(parent) or {})  # the recipe itself stays as it is
            place = place[parent]
        place.pop(last, None)
    return json.dumps(left, sort_keys=True)


def _get_key(recipe: Mapping[str, Any], key: str) -> object:
    place: object = recipe
    for part in key.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place


def _group_by(records: Iterable[RunRecord], key: Callable[[RunRecord], object]) -> list[list[RunRecord]]:
    groups: dict[object, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return list(groups.values())


def _device_key(record: RunRecord) -> tuple[str, str, int]:
    return record.device.type, record.device.name, record.device.num_processes


def _split_by_fingerprints(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Groups of one base and of one data set. A run that ended before it knew them stands with the first that fits."""
    groups: list[tuple[dict[str, str], list[RunRecord]]] = []
    for record in sorted(records, key=lambda one: (one.model_fingerprint, one.data_fingerprint).count(None)):
        origin = {"model": record.model_fingerprint, "data": record.data_fingerprint}
        known = {what: identity for what, identity in origin.items() if identity is not None}
        for there, runs in groups:
            if all(there.get(what, identity) == identity for what, identity in known.items()):
                there.update(known)
                runs.append(record)
                break
        else:
            groups.append((known, [record]))
    place = {id(record): index for index, record in enumerate(records)}
    return [sorted(runs, key=lambda run: place[id(run)]) for _, runs in groups]


def _with_unique_labels(groups: Sequence[RunGroup]) -> list[RunGroup]:
    """With a label of its own for each: with its device where that is what differs, else numbered."""
    named = []
    for one in groups:
        devices = [_device_key(other.runs[0]) for other in groups if other.label == one.label]
        alone = len(devices) > 1 and len(set(devices)) == len(devices)
        named.append(replace(one, label=f"{one.label} on {_device_label(one.runs[0])}") if alone else one)
    seen: Counter[str] = Counter()
    for index, one in enumerate(named):
        seen[one.label] += 1
        if seen[one.label] > 1:  # two suites in one folder may have runs of one name
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


def _rouge_l_score(run: RunRecord) -> float | None:
    found = (run.quality.rouge or {}).get("rougeL") if run.quality else None
    return found.mean if found else None


def _common_name(names: Sequence[str]) -> str:
    """What names share: of ``lora-seed=0`` and ``lora-seed=1`` it is ``lora``."""
    words = [name.split("-") for name in names]
    if len({len(one) for one in words}) == 1:
        same = "-".join(places[0] for places in zip(*words, strict=True) if len(set(places)) == 1)
        if same:
            return same
    beginning = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in beginning).rstrip("-_=. ")


def _mean_if_known(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if not known or None in known else statistics.fmean(value for value in known if value is not None)
